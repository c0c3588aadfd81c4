//! What a tabletop scene is made of: six shapes, eight colours, two sizes, on a plain table of 128 x 128 pixels.

use super::shapes;
use crate::scene::{graph::Object, relation::BoundingBox};
use serde::{Deserialize, Serialize};

/// Width and height of a picture in pixels.
pub const SIDE: u32 = 128;

/// Implements the closed vocabulary of one word class: all variants, names, and names back.
macro_rules! vocabulary {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "lowercase")]
        pub enum $name { $($variant),+ }

        impl $name {
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($word => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

vocabulary! {
    /// The six outlines, as unlike one another as they can be at a radius of a dozen pixels.
    Shape { Ball = "ball", Cube = "cube", Cone = "cone", Ring = "ring", Star = "star", Cylinder = "cylinder" }
}
vocabulary! {
    /// Eight colours that stay apart in hue (or in saturation, for black) under shading and blur.
    Colour {
        Red = "red", Yellow = "yellow", Green = "green", Cyan = "cyan",
        Blue = "blue", Purple = "purple", Pink = "pink", Black = "black",
    }
}
vocabulary! {
    /// Two sizes with a wide gap between them.
    Size { Small = "small", Large = "large" }
}

impl Colour {
    /// The colour at full light, in sRGB.
    pub fn rgb(self) -> [f32; 3] {
        match self {
            Self::Red => [222.0, 46.0, 50.0],
            Self::Yellow => [248.0, 206.0, 44.0],
            Self::Green => [44.0, 164.0, 78.0],
            Self::Cyan => [44.0, 204.0, 216.0],
            Self::Blue => [42.0, 86.0, 218.0],
            Self::Purple => [136.0, 60.0, 202.0],
            Self::Pink => [248.0, 112.0, 204.0],
            Self::Black => [46.0, 46.0, 52.0],
        }
    }
}

impl Size {
    /// Radii in pixels: the range that scenes draw from.
    pub fn radii(self) -> (f32, f32) {
        match self {
            Self::Small => (10.5, 13.0),
            Self::Large => (19.0, 22.0),
        }
    }

    /// The size of an object of this radius.
    pub fn of_radius(radius: f32) -> Self {
        if radius < 16.0 { Self::Small } else { Self::Large }
    }

    pub fn other(self) -> Self {
        match self {
            Self::Small => Self::Large,
            Self::Large => Self::Small,
        }
    }
}

/// One thing on the table. Its box's centre is `(x, y)`; the larger `depth`, the nearer to the viewer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Item {
    pub shape: Shape,
    pub colour: Colour,
    pub size: Size,
    pub x: f32,
    pub y: f32,
    pub radius: f32,
    pub depth: i16,
}

impl Item {
    pub fn bounding_box(&self) -> BoundingBox {
        let (w, h) = shapes::half_extent(self.shape);
        let (w, h) = (w * self.radius, h * self.radius);
        BoundingBox { x0: self.x - w, y0: self.y - h, x1: self.x + w, y1: self.y + h }
    }

    /// Signed distance of a pixel position from the outline, in pixels, negative within.
    pub fn distance(&self, x: f32, y: f32) -> f32 {
        self.radius * shapes::distance(self.shape, (x - self.x) / self.radius, (y - self.y) / self.radius)
    }

    /// The object in full: `large red ball`.
    pub fn object(&self) -> Object {
        Object::new(self.shape.name(), vec![self.size.name().into(), self.colour.name().into()])
    }
}

/// The table: a light neutral colour with a faint gradient.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Background {
    /// sRGB at the centre.
    pub rgb: [f32; 3],
    /// Change of brightness from the centre to the right and to the bottom edge.
    pub slope: [f32; 2],
}

/// Items in the order a graph names them (painted by `depth`), on a background.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scene {
    pub background: Background,
    pub items: Vec<Item>,
}

impl Scene {
    /// Indices of the items from the farthest to the nearest.
    pub fn painting_order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.items.len()).collect();
        order.sort_by_key(|&i| self.items[i].depth);
        order
    }

    /// The depth of a thing put in front of all others.
    pub fn top_depth(&self) -> i16 {
        self.items.iter().map(|i| i.depth.saturating_add(1)).max().unwrap_or(0)
    }

    /// The depth of a thing put behind all others.
    pub fn bottom_depth(&self) -> i16 {
        self.items.iter().map(|i| i.depth.saturating_sub(1)).min().unwrap_or(0)
    }

    /// The items' objects, in full.
    pub fn objects(&self) -> Vec<Object> {
        self.items.iter().map(Item::object).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        assert!(Shape::ALL.iter().all(|&s| Shape::from_name(s.name()) == Some(s)));
        assert!(Colour::ALL.iter().all(|&c| Colour::from_name(c.name()) == Some(c)));
        assert!(Size::ALL.iter().all(|&s| Size::from_name(s.name()) == Some(s)));
        assert_eq!((Shape::ALL.len(), Colour::ALL.len()), (6, 8));
    }

    #[test]
    fn sizes_leave_a_gap() {
        assert!(Size::Large.radii().0 - Size::Small.radii().1 >= 6.0);
        for &size in Size::ALL {
            let (low, high) = size.radii();
            assert!(Size::of_radius(low) == size && Size::of_radius(high) == size);
        }
    }
}
