//! Random numbers from a seed: the same seed repeats the draws of a run, but not its timing.

use std::time::Duration;

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    /// The stream `number` of a seed.
    pub fn new(seed: u64, number: u64) -> Self {
        let mut random = Self(seed ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93));
        random.next();
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from 0 to `most`, inclusive.
    pub fn up_to(&mut self, most: u32) -> u32 {
        let number = self.next() % (u64::from(most) + 1);
        u32::try_from(number).expect("it is at most `most`")
    }

    /// True with a probability of 1 in `times`.
    pub fn once_in(&mut self, times: u32) -> bool {
        self.up_to(times.saturating_sub(1)) == 0
    }

    /// A duration from 0 to `most_ms` milliseconds, in steps of a microsecond.
    pub fn pause(&mut self, most_ms: u32) -> Duration {
        Duration::from_micros(self.up_to(most_ms.saturating_mul(1000)).into())
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn a_seed_repeats_and_stays_in_its_bounds() {
        let draw = |seed, number| {
            let mut random = Random::new(seed, number);
            (0..1000).map(|_| random.up_to(9)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        assert_ne!(draw(1, 2), draw(2, 2));
        let mut seen = draw(7, 7);
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, (0..=9).collect::<Vec<_>>());
    }
}
