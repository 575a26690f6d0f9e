//! A bar chart in characters. Pure.

/// The maximum length of the longest bar, in characters.
const MAX_LENGTH: usize = 40;
/// With less room than this for the longest bar there is no chart: the bars would all be alike.
const MIN_LENGTH: usize = 10;

/// Rows of a name, a count and a bar in proportion to the count; `None` if `columns` has no room for bars.
/// A count above zero has a bar of at least one character.
pub fn chart(rows: &[(&str, usize)], columns: usize) -> Option<Vec<String>> {
    let names = rows.iter().map(|row| row.0.len()).max().unwrap_or(0);
    let max = rows.iter().map(|row| row.1).max().unwrap_or(0);
    let digits = max.to_string().len();
    let room = columns.checked_sub(2 + names + 2 + digits + 2)?;
    let longest = (room >= MIN_LENGTH).then_some(room.min(MAX_LENGTH))?;
    let row = |(name, count): &(&str, usize)| {
        let bar = "#".repeat((count * longest).div_ceil(max.max(1)));
        let row = format!("  {name:names$}  {count:>digits$}  {bar}");
        row.trim_end().to_owned()
    };
    Some(rows.iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_in_proportion_and_fit() {
        let rows = [("drained", 200), ("unread", 100), ("sending", 1), ("x", 0)];
        let wide = chart(&rows, 200).unwrap();
        let bars: Vec<usize> = wide.iter().map(|row| row.matches('#').count()).collect();
        assert_eq!(bars, [40, 20, 1, 0]);
        for columns in [26, 30, 50] {
            let chart = chart(&rows, columns).unwrap();
            assert!(chart.iter().all(|row| row.len() <= columns), "{chart:?}");
            assert!(chart[0].contains("##########"), "{chart:?}");
        }
    }

    #[test]
    fn without_room_there_is_no_chart() {
        for columns in [0, 10, 25] {
            assert_eq!(chart(&[("drained", 200)], columns), None);
        }
        assert_eq!(chart(&[], 80), Some(Vec::new()));
    }
}
