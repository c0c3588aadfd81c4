use super::*;
use crate::scene::tabletop::world::Background;

fn item(shape: Shape, colour: Colour, size: Size, x: f32, y: f32) -> Item {
    Item { shape, colour, size, x, y, radius: size.radii().0, depth: x as i16 }
}

fn table() -> Scene {
    Scene {
        background: Background { rgb: [230.0; 3], slope: [0.0; 2] },
        items: vec![
            item(Shape::Ball, Colour::Red, Size::Small, 30.0, 30.0),
            item(Shape::Cube, Colour::Blue, Size::Large, 90.0, 36.0),
            item(Shape::Ball, Colour::Green, Size::Small, 64.0, 100.0),
        ],
    }
}

fn apply(text: &str) -> Option<Scene> {
    Edit::parse(text).unwrap().apply(&mut Stream::new(1, "edit", 0), &table())
}

#[test]
fn instructions_in_an_actors_words_are_carried_out() {
    let moved = apply("Move the red ball to the right of the blue cube.").is_none();
    assert!(moved, "there is no room to the right of the cube");
    let moved = apply("move the red ball below the cube").unwrap();
    assert!(moved.view().holds(0, Spatial::Below, 1));
    let swapped = apply("swap the red ball and the cube").unwrap();
    assert_eq!((swapped.items[0].x, swapped.items[1].x), (90.0, 30.0));
    let added = apply("add a small yellow ring left of the green ball").unwrap();
    assert!(added.items.len() == 4 && added.view().holds(3, Spatial::LeftOf, 2));
    assert_eq!(apply("remove the green ball").unwrap().items.len(), 2);
    assert_eq!(apply("make the cube yellow").unwrap().items[1].colour, Colour::Yellow);
    assert_eq!(apply("change the colour of the red ball to pink").unwrap().items[0].colour, Colour::Pink);
    assert_eq!(apply("make the cube smaller").unwrap().items[1].size, Size::Small);
    let replaced = apply("replace the cube with a small black star").unwrap().items[1];
    assert_eq!((replaced.shape, replaced.colour, replaced.size), (Shape::Star, Colour::Black, Size::Small));
    for (said, plain) in [
        ("Please turn the cube yellow.", "make the cube yellow"),
        ("get rid of the green ball, please", "remove the green ball"),
        ("shrink the sphere", "make the ball smaller"),
        ("put a green ring over the cube", "add a green ring above the cube"),
        ("place the ball on the left side of the box", "move the ball to the left of the cube"),
        (
            "move the ball left of the cube and above a green ball",
            "move the ball to the left of the cube and above the green ball",
        ),
        (
            "move the ball left of the cube, above a green ball, please",
            "move the ball to the left of the cube and above the green ball",
        ),
    ] {
        assert_eq!(Edit::parse(said).unwrap().plain(), plain);
    }
}

#[test]
fn what_cannot_be_done_is_not_done() {
    // Two balls, no star, nothing to change, nothing that fits.
    assert!(apply("remove the ball").is_none());
    assert!(apply("remove the star").is_none());
    assert!(apply("make the cube blue").is_none() && apply("make the cube larger").is_none());
    assert!(apply("move the red ball to the left of the cube").is_none());
    assert!(apply("swap the cube and the cube").is_none());
    assert!(apply("move the red ball inside the cube").is_none());
}

#[test]
fn several_places_hold_together() {
    let moved = apply("move the green ball to the left of the blue cube and below the red ball").unwrap();
    let view = moved.view();
    assert!(view.holds(2, Spatial::LeftOf, 1) && view.holds(2, Spatial::Below, 0));
    let three =
        "add a small pink cone below the red ball and to the left of the cube and to the left of the green ball";
    let view = apply(three).unwrap().view();
    assert!(view.holds(3, Spatial::Below, 0) && [1, 2].iter().all(|j| view.holds(3, Spatial::LeftOf, *j)));
    let edit = Edit::parse("add a pink cone to the right of the green ball and below the cube").unwrap();
    assert_eq!(edit.named().len(), 3);
    // There is no place for all of them.
    assert!(apply("move the red ball to the left of the green ball and to the right of the cube").is_none());
    assert!(apply("move the red ball to the left of the cube and above the red ball").is_none());
    let error = |text: &str| Edit::parse(text).unwrap_err().to_string();
    assert!(error("move the ball above the cube and").contains("\"and\" after the end"));
    assert!(error("add a ball above the cube and the ring").contains("\"and\" after the end"));
    let four = "add a ball above the cube and below the ring and left of the cone and right of the star";
    assert!(error(four).contains("after the end"));
}

#[test]
fn of_two_alike_things_the_side_says_which() {
    let mut two = table();
    two.items.push(item(Shape::Ball, Colour::Red, Size::Small, 36.0, 110.0));
    let left = |text: &str| {
        let edited = Edit::parse(text).unwrap().apply(&mut Stream::new(1, "edit", 0), &two);
        edited.map(|edited| edited.items.iter().map(|i| i.y).collect::<Vec<_>>())
    };
    assert_eq!(left("remove the red ball"), None);
    assert_eq!(left("remove the upper red ball"), Some(vec![36.0, 100.0, 110.0]));
    assert_eq!(left("remove the lower red ball"), Some(vec![30.0, 36.0, 100.0]));
    // The first lies to the left of the second, but above it much more.
    let names: Vec<_> = (0..4).map(|i| name(&two.view(), i).unwrap().phrase()).collect();
    assert_eq!(
        names,
        ["upper red ball", "blue cube", "green ball", "lower red ball"].map(|n| n.replace("red", "small red"))
    );
    let edit = Edit::parse("move the left small red ball below the right red ball").unwrap();
    assert_eq!(Edit::parse(&edit.plain()), Ok(edit));
}

#[test]
fn what_lies_as_no_world_would_have_it_can_be_edited_elsewhere() {
    let mut odd = table();
    // One ball twice, over the edge and across the cube.
    odd.items.push(item(Shape::Ball, Colour::Red, Size::Small, 2.0, 64.0));
    odd.items.push(item(Shape::Cone, Colour::Blue, Size::Small, 84.0, 40.0));
    let apply = |text: &str| Edit::parse(text).unwrap().apply(&mut Stream::new(1, "edit", 0), &odd);
    assert_eq!(apply("remove the left red ball").unwrap().items.len(), 4);
    assert_eq!(apply("make the green ball yellow").unwrap().items[2].colour, Colour::Yellow);
    assert!(apply("make the green ball red").is_none(), "there would be three red balls");
    assert!(apply("add a small pink star above the green ball").is_some());
}

#[test]
fn a_doubled_scene_has_one_thing_twice() {
    let twice = (0..20).filter_map(|i| doubled(&mut Stream::new(3, "double", i), &table()));
    let twice: Vec<Scene> = twice.collect();
    assert!(twice.len() > 10);
    for scene in twice {
        let alike: Vec<usize> = (0..4).filter(|i| !sample::distinct(&scene, *i)).collect();
        assert_eq!((alike.len(), alike[1]), (2, 3));
        for i in alike {
            assert_eq!(find(&scene, &name(&scene.view(), i).unwrap()), Some(i));
        }
    }
}

#[test]
fn other_texts_are_refused_with_a_reason() {
    let error = |text: &str| Edit::parse(text).unwrap_err().to_string();
    assert!(error("fly to the moon").contains("begins with one of move"));
    assert!(error("move the ball").contains("a relation"));
    assert!(error("change the colour of the ball to orange").contains("\"orange\" where a colour"));
    assert!(error("make the ball").contains("\"the end\" where a colour or a size"));
    assert!(error("make the ball sparkling").contains("\"sparkling\" where a colour or a size"));
    assert!(error("replace the ball").contains("\"with\""));
    assert!(error("remove the bal").contains("did you mean \"ball\""));
    assert!(error("remove the ball quickly").contains("after the end"));
    assert!(error("add the ball").contains("nothing new"));
    assert!(error("").contains("begins"));
}
