//! Lays out rows into the width of a terminal. Columns that do not fit are dropped, the least worthy first; no cell is broken.

use std::fmt::Write as _;

use crate::text::columns_of;

/// The space between two columns.
pub const GAP: usize = 2;
/// The worth of a column that is never dropped.
pub const KEPT: u8 = u8::MAX;

/// A colour of a cell, as the parameter of the escape sequence SGR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Color {
    Red = 31,
    Green = 32,
    Yellow = 33,
}

/// One cell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    pub text: String,
    /// The same in less room.
    pub short: Option<String>,
    pub color: Option<Color>,
}

impl Cell {
    pub fn new(text: impl ToString) -> Self {
        Cell {
            text: text.to_string(),
            short: None,
            color: None,
        }
    }

    pub fn color(self, color: Option<Color>) -> Self {
        Cell { color, ..self }
    }
}

/// One column with its cells, from the first row to the last.
#[derive(Clone, Debug)]
pub struct Column {
    pub header: &'static str,
    /// The columns with the lowest worth are dropped first; [`KEPT`] is never dropped.
    pub worth: u8,
    pub is_number: bool,
    pub cells: Vec<Cell>,
}

impl Column {
    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|cell| columns_of(&cell.text));
        cells.chain([self.header.len()]).max().unwrap_or(0)
    }

    fn shorten(&mut self) {
        for cell in &mut self.cells {
            if let Some(short) = cell.short.take() {
                cell.text = short;
            }
        }
    }
}

/// The columns that fit into `width`. First cells give way to their short forms, then columns are dropped. Those that are never
/// dropped may still be wider.
pub fn fit(mut columns: Vec<Column>, width: usize) -> Vec<Column> {
    if total(&columns) > width {
        columns.iter_mut().for_each(Column::shorten);
    }
    let worths: Vec<u8> = columns.iter().map(|column| column.worth).collect();
    let widths: Vec<usize> = columns.iter().map(Column::width).collect();
    let is_kept = keep_what_fits(&worths, |is_kept| {
        let kept = widths.iter().zip(is_kept).filter(|(_, is_kept)| **is_kept);
        total_of(kept.map(|(width, _)| *width)) <= width
    });
    let mut is_kept = is_kept.into_iter();
    columns.retain(|_| is_kept.next().unwrap_or(true));
    columns
}

/// Which columns are left when those with the lowest worth are dropped until the others `fit`. [`KEPT`] is never dropped.
pub fn keep_what_fits(worths: &[u8], fit: impl Fn(&[bool]) -> bool) -> Vec<bool> {
    let mut is_kept = vec![true; worths.len()];
    while !fit(&is_kept) {
        let columns = worths.iter().zip(&is_kept);
        let droppable = columns.filter(|(worth, is_kept)| **is_kept && **worth != KEPT);
        let Some(least) = droppable.map(|(worth, _)| *worth).min() else {
            break;
        };
        for (worth, is_kept) in worths.iter().zip(&mut is_kept) {
            *is_kept &= *worth != least;
        }
    }
    is_kept
}

/// The width of a row.
pub fn total(columns: &[Column]) -> usize {
    total_of(columns.iter().map(Column::width))
}

fn total_of(widths: impl Iterator<Item = usize>) -> usize {
    let with_gaps: usize = widths.map(|width| width + GAP).sum();
    with_gaps.saturating_sub(GAP)
}

/// The lines of the table.
pub fn lines(columns: &[Column], header: bool, color: bool) -> Vec<String> {
    let widths: Vec<usize> = columns.iter().map(Column::width).collect();
    let rows = columns.first().map_or(0, |column| column.cells.len());
    let mut lines = Vec::with_capacity(rows + 1);
    if header {
        lines.push(line(columns, &widths, |column| (column.header, None)));
    }
    for row in 0..rows {
        lines.push(line(columns, &widths, |column| {
            let cell = &column.cells[row];
            (&cell.text, cell.color.filter(|_| color))
        }));
    }
    lines
}

fn line<'c>(
    columns: &'c [Column],
    widths: &[usize],
    cell: impl Fn(&'c Column) -> (&'c str, Option<Color>),
) -> String {
    let mut line = String::new();
    // Spaces are written only before a text, so no line ends with one.
    let mut owed = 0;
    for (column, width) in columns.iter().zip(widths) {
        let (text, color) = cell(column);
        let padding = width - columns_of(text);
        let (before, after) = match column.is_number {
            true => (padding, 0),
            false => (0, padding),
        };
        owed += before;
        if !text.is_empty() {
            line.extend(std::iter::repeat_n(' ', owed));
            owed = 0;
            match color {
                Some(color) => {
                    let _ = write!(line, "\x1b[{}m{text}\x1b[0m", color as u8);
                }
                None => line.push_str(text),
            }
        }
        owed += after + GAP;
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(header: &'static str, worth: u8, cells: &[&str]) -> Column {
        Column {
            header,
            worth,
            is_number: worth == 7,
            cells: cells.iter().map(Cell::new).collect(),
        }
    }

    fn table() -> Vec<Column> {
        let mut causes = column("CAUSES", 5, &["drained", "unread 1, drained 2"]);
        causes.cells[1].short = Some("drained 2 +1".into());
        vec![
            column("PROCESS", KEPT, &["java/1", "node/22"]),
            column("STUCK", 7, &["1", "1000"]),
            causes,
            column("PORTS", 3, &["80", ""]),
        ]
    }

    fn laid_out(width: usize) -> Vec<String> {
        lines(&fit(table(), width), true, false)
    }

    #[test]
    fn cells_are_shortened_before_columns_are_dropped() {
        assert_eq!(
            laid_out(80),
            [
                "PROCESS  STUCK  CAUSES               PORTS",
                "java/1       1  drained              80",
                "node/22   1000  unread 1, drained 2",
            ]
        );
        assert_eq!(
            laid_out(41),
            [
                "PROCESS  STUCK  CAUSES        PORTS",
                "java/1       1  drained       80",
                "node/22   1000  drained 2 +1",
            ]
        );
        assert_eq!(laid_out(34)[2], "node/22   1000  drained 2 +1");
        assert_eq!(laid_out(34)[0], "PROCESS  STUCK  CAUSES");
        assert_eq!(laid_out(27)[0], "PROCESS  STUCK");
        assert_eq!(laid_out(13), ["PROCESS", "java/1", "node/22"]);
        assert_eq!(laid_out(0), ["PROCESS", "java/1", "node/22"]);
    }

    #[test]
    fn no_row_is_wider_than_asked() {
        for width in 7..100 {
            for line in laid_out(width) {
                assert!(
                    line.len() <= width && !line.ends_with(' '),
                    "{width}: {line:?}"
                );
            }
        }
    }

    #[test]
    fn colors_take_no_room() {
        let mut table = table();
        table[1].cells[0].color = Some(Color::Red);
        let plain = lines(&table, false, false);
        let colored = lines(&table, false, true);
        assert_eq!(colored[0].replace("\x1b[31m1\x1b[0m", "1"), plain[0]);
        assert_eq!(colored[1], plain[1]);
    }
}
