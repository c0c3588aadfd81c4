//! Shares and their 95% intervals.

use serde::Serialize;

/// A share of successes among trials.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    pub good: usize,
    pub all: usize,
}

/// What is written of a [`Share`].
#[derive(Serialize)]
struct Written {
    share: f64,
    low: f64,
    high: f64,
    good: usize,
    all: usize,
}

impl Share {
    pub fn count(&mut self, good: bool) {
        self.good += usize::from(good);
        self.all += 1;
    }

    pub fn value(self) -> f64 {
        self.good as f64 / self.all.max(1) as f64
    }

    /// Wilson's 95% interval.
    pub fn interval(self) -> (f64, f64) {
        if self.all == 0 {
            return (0.0, 1.0);
        }
        let (n, p, z) = (self.all as f64, self.value(), 1.959_964);
        let middle = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
        let half = z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        ((middle - half).max(0.0), (middle + half).min(1.0))
    }

    /// In percent with the interval, for a table.
    pub fn cell(self) -> String {
        let (low, high) = self.interval();
        format!("{:.1} ({:.1} to {:.1})", 100.0 * self.value(), 100.0 * low, 100.0 * high)
    }
}

impl Serialize for Share {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (low, high) = self.interval();
        Written { share: self.value(), low, high, good: self.good, all: self.all }.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilsons_interval_is_that_of_the_textbook() {
        let (low, high) = Share { good: 8, all: 10 }.interval();
        assert!((low - 0.4902).abs() < 1e-3 && (high - 0.9433).abs() < 1e-3, "{low} {high}");
        assert_eq!(Share { good: 8, all: 10 }.cell(), "80.0 (49.0 to 94.3)");
        assert_eq!(Share::default().interval(), (0.0, 1.0));
        assert!(Share { good: 5, all: 5 }.interval().0 < 0.6);
    }
}
