//! Metrics of a step gathered from its parts.

use super::Metrics;

/// Weighted means of metrics over the parts that have them: name, sum and weight, in the order of their coming.
#[derive(Default)]
pub struct Means(Vec<(String, f64, f64)>);

impl Means {
    pub fn add(&mut self, (name, value): (String, f64), weight: f64) {
        match self.0.iter_mut().find(|(known, ..)| *known == name) {
            Some((_, sum, weights)) => (*sum, *weights) = (*sum + weight * value, *weights + weight),
            None => self.0.push((name, weight * value, weight)),
        }
    }

    pub fn metrics(&self) -> Metrics {
        self.0.iter().map(|(name, sum, weight)| (name.clone(), sum / weight)).collect()
    }
}
