//! The order of the targets in a report.

use std::time::Duration;

use rayon::prelude::*;

use crate::model::Target;
use crate::tcp::Tuple;

/// Sorts targets, the oldest first. Those of the same age are in the order of their addresses, so that two runs show them in the same
/// order.
///
/// The ages of two sockets that became stuck at the same time can differ by some ticks of the kernel's clock, in another way in each
/// run: the clock goes on while the kernel lists them. So ages with no gap between them count as the same, over at most a second.
pub(crate) fn sort(targets: &mut [Target]) {
    /// The longest tick, that of CONFIG_HZ=100.
    const GAP: Duration = Duration::from_millis(10);
    const SPAN: Duration = Duration::from_secs(1);
    // Not the targets are compared and moved, which are large.
    let place = |(index, target): (usize, &Target)| Place {
        age: target.socket.age,
        address: (target.socket.netns, target.socket.tuple()),
        index,
    };
    let mut places: Vec<Place> = targets.par_iter().enumerate().map(place).collect();
    places.par_sort_by(|a, b| (b.age, &a.address).cmp(&(a.age, &b.address)));
    let mut rest = &mut places[..];
    while let Some(first) = rest.first() {
        let oldest = first.age.unwrap_or_default();
        let is_gap = |pair: &[Place]| match (pair[0].age, pair[1].age) {
            (Some(before), Some(age)) => before - age > GAP || oldest - age > SPAN,
            (before, age) => before != age,
        };
        let length = rest
            .windows(2)
            .position(is_gap)
            .map_or(rest.len(), |gap| gap + 1);
        let (same, others) = rest.split_at_mut(length);
        same.par_sort_by_key(|place| place.address);
        rest = others;
    }
    let from = places.iter().map(|place| place.index).collect();
    rearrange(targets, from);
}

/// What decides about the place of a target in a report.
struct Place {
    age: Option<Duration>,
    /// An order that no age changes.
    address: (usize, Tuple),
    /// Where the target is now.
    index: usize,
}

/// Moves each item to its place. `from`: for each place, where its item is now.
fn rearrange<T>(items: &mut [T], mut from: Vec<usize>) {
    for start in 0..items.len() {
        // The places that exchange their items are a circle.
        let mut place = start;
        while from[place] != start {
            let next = std::mem::replace(&mut from[place], place);
            items.swap(place, next);
            place = next;
        }
        from[place] = place;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Socket;
    use crate::sock_diag::testdata::stuck;

    /// Targets of these ages in milliseconds, each with a higher port than the one before.
    fn sorted(ages: &[u64]) -> Vec<usize> {
        let target = |(port, age): (usize, &u64)| {
            let message = stuck("10.0.0.1:80", &format!("10.0.0.2:{}", 1000 + port), 1);
            let mut target = Target::new(Socket::from_message(&message));
            target.socket.age = (*age > 0).then_some(Duration::from_millis(*age));
            target
        };
        let mut targets: Vec<Target> = ages.iter().enumerate().map(target).collect();
        sort(&mut targets);
        let port = |target: &Target| usize::from(target.socket.tuple().peer.port()) - 1000;
        targets.iter().map(port).collect()
    }

    #[test]
    fn sockets_of_one_moment_are_in_the_order_of_their_addresses() {
        assert_eq!(sorted(&[5000, 5004, 5000, 5008]), [0, 1, 2, 3]);
        assert_eq!(sorted(&[5004, 5000, 5004, 5004]), [0, 1, 2, 3]);
        // Older ones come first.
        assert_eq!(sorted(&[5000, 5011]), [1, 0]);
        assert_eq!(sorted(&[0, 5000, 0, 9000]), [3, 1, 0, 2]);
        assert_eq!(sorted(&[]), [0; 0]);
        // A second at most counts as one moment.
        let stream: Vec<u64> = (0..300).map(|number| 5000 + number * 10).collect();
        let sorted = sorted(&stream);
        assert_eq!(sorted[..2], [199, 200]);
        assert_eq!(sorted.last(), Some(&97));
    }

    proptest! {
        #[test]
        fn each_item_gets_to_its_place(from in Just((0..100).collect::<Vec<usize>>()).prop_shuffle()) {
            let mut items: Vec<usize> = (0..100).collect();
            rearrange(&mut items, from.clone());
            prop_assert_eq!(items, from);
        }
    }
}
