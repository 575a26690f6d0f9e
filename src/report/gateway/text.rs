//! The report of `cwkill gateway` for people.

use std::io::{self, Write};

use super::{ForwardedRun, summary};
use crate::config::GatewayConfig;
use crate::model::{EndReport, EndState, EntryDeletion, Forwarded, ForwardedOutcome};
use crate::report::layout::{GAP, KEPT};
use crate::report::table::{Wanted, fit, join};
use crate::text::{age, broken, counted};

/// Writes the table and the summary. `columns`: of the terminal, if `out` is one.
pub fn write(
    run: &ForwardedRun,
    config: &GatewayConfig,
    columns: Option<usize>,
    out: &mut dyn Write,
) -> io::Result<()> {
    if !run.scan.connections.is_empty() {
        write_table(run, config, columns, out)?;
    }
    for line in broken(&summary(run, config), columns) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// A column of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Column {
    Source,
    Destination,
    NatSource,
    NatDestination,
    State,
    Age,
    Mark,
    Left,
    Status,
    Zone,
    Id,
    Plan,
    Result,
}

impl Column {
    pub(super) fn header(self) -> &'static str {
        match self {
            Column::Source => "SOURCE",
            Column::Destination => "DESTINATION",
            Column::NatSource => "NAT-SRC",
            Column::NatDestination => "NAT-DST",
            Column::State => "STATE",
            Column::Age => "AGE",
            Column::Mark => "MARK",
            Column::Left => "LEFT",
            Column::Status => "STATUS",
            Column::Zone => "ZONE",
            Column::Id => "ID",
            Column::Plan => "PLAN",
            Column::Result => "RESULT",
        }
    }

    fn is_number(self) -> bool {
        matches!(self, Column::Age | Column::Left)
    }

    /// The columns with the lowest worth are dropped first from a terminal without room.
    fn worth(self) -> u8 {
        match self {
            Column::Source | Column::Destination | Column::Plan | Column::Result => KEPT,
            Column::State => 80,
            Column::Age => 70,
            Column::NatDestination => 60,
            Column::NatSource => 50,
            Column::Mark => 40,
            Column::Zone => 30,
            Column::Left => 25,
            Column::Status => 20,
            Column::Id => 10,
        }
    }

    /// Addresses, states and numbers: nothing that a stranger has chosen freely.
    pub(super) fn text(self, connection: &Forwarded, run: &ForwardedRun, verbose: bool) -> String {
        let entry = &connection.entry;
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        match self {
            Column::Source => entry.original.local.to_string(),
            Column::Destination => entry.original.peer.to_string(),
            Column::NatSource => or_dash(entry.nat_source().map(|address| address.to_string())),
            Column::NatDestination => {
                or_dash(entry.nat_destination().map(|address| address.to_string()))
            }
            Column::State => or_dash(entry.state.map(|state| state.name().to_uppercase())),
            Column::Age => or_dash(connection.quiet.map(age)),
            Column::Mark => or_dash(entry.mark.map(|mark| format!("{mark:#x}"))),
            Column::Left => or_dash(entry.left.map(age)),
            Column::Status => join(entry.status.names().map(str::to_owned), ","),
            Column::Zone => entry.zone.id.to_string(),
            Column::Id => or_dash(entry.id.map(|id| format!("{id:08x}"))),
            Column::Plan => match connection.skip {
                Some(skip) => format!("skip: {skip}"),
                None => or_dash(run.act.map(|act| act.name().to_owned())),
            },
            Column::Result => result(connection, verbose),
        }
    }
}

/// The names of the ends, in the order of [`Forwarded::ends`].
const ENDS: [&str; 2] = ["source", "destination"];

/// A connection by its addresses, with what NAT makes of them.
pub(crate) fn named(connection: &Forwarded) -> String {
    let entry = &connection.entry;
    let mut text = format!("{} {}", entry.original.local, entry.original.peer);
    let new = [("as", entry.nat_source()), ("to", entry.nat_destination())];
    for (word, address) in new {
        if let Some(address) = address {
            text += &format!(" {word} {address}");
        }
    }
    text
}

/// The outcome in words; empty before it is known. With `verbose`, what each end has said.
pub(crate) fn result(connection: &Forwarded, verbose: bool) -> String {
    let Some(outcome) = &connection.outcome else {
        return String::new();
    };
    let ends = || {
        let each = ENDS.iter().zip(&connection.ends);
        let said = each.map(|(name, end)| match (end.now, end.resets) {
            (EndState::Alive, resets @ 1..) => {
                format!("{name} alive after {}", counted(resets.into(), "RST"))
            }
            (now, _) => format!("{name} {}", now.name()),
        });
        join(said, ", ")
    };
    let mut text = match outcome {
        ForwardedOutcome::Cut if verbose => format!("cut: {}", ends()),
        ForwardedOutcome::Cut => "cut".to_owned(),
        ForwardedOutcome::Healed => {
            let forgot = |end: &EndReport| end.first == EndState::Gone;
            let who = match connection.ends.each_ref().map(forgot) {
                [true, true] => "both ends",
                [true, false] => "the source",
                _ => "the destination",
            };
            format!("healed: {who} had forgotten it")
        }
        ForwardedOutcome::Half => format!("half: {}", ends()),
        ForwardedOutcome::Alive => format!("alive: {}", ends()),
        ForwardedOutcome::Gone => "gone on its own".to_owned(),
        ForwardedOutcome::Skipped(why) => format!("skipped: {why}"),
        ForwardedOutcome::Failed(why) => format!("failed: {why}"),
    };
    match &connection.deleted {
        Some(deleted @ (EntryDeletion::Offloaded | EntryDeletion::Failed(_))) => {
            text += &format!("; entry {deleted}");
        }
        Some(EntryDeletion::Deleted | EntryDeletion::Gone) | None => {}
    }
    text
}

fn columns_for(run: &ForwardedRun, config: &GatewayConfig) -> Vec<Column> {
    let any = |is: &dyn Fn(&Forwarded) -> bool| run.scan.connections.iter().any(is);
    let mut columns = vec![Column::Source, Column::Destination];
    columns.extend(any(&|one| one.entry.nat_source().is_some()).then_some(Column::NatSource));
    let has_new_destinations = any(&|one| one.entry.nat_destination().is_some());
    columns.extend(has_new_destinations.then_some(Column::NatDestination));
    columns.extend([Column::State, Column::Age]);
    columns.extend(any(&|one| one.entry.mark.unwrap_or(0) != 0).then_some(Column::Mark));
    if config.verbose {
        columns.extend([Column::Left, Column::Status, Column::Zone, Column::Id]);
    }
    columns.extend(match (run.act, run.acted) {
        (None, _) => None,
        (Some(_), false) => Some(Column::Plan),
        (Some(_), true) => Some(Column::Result),
    });
    columns
}

/// One row, with `text` for each column.
pub(super) fn row(columns: &[Column], widths: &[usize], text: &dyn Fn(Column) -> String) -> String {
    let mut line = String::new();
    for (column, width) in columns.iter().zip(widths) {
        let text = text(*column);
        line += &match column.is_number() {
            true => format!("{text:>width$}{:GAP$}", ""),
            false => format!("{text:<width$}{:GAP$}", ""),
        };
    }
    line.trim_end().to_owned()
}

/// A table can have a million rows, so the texts are made twice: for the widths, and to be written.
fn write_table(
    run: &ForwardedRun,
    config: &GatewayConfig,
    terminal: Option<usize>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let mut columns = columns_for(run, config);
    let mut widths: Vec<usize> = columns.iter().map(|it| it.header().len()).collect();
    for connection in &run.scan.connections {
        for (column, width) in columns.iter().zip(&mut widths) {
            *width = column
                .text(connection, run, config.verbose)
                .len()
                .max(*width);
        }
    }
    if let Some(terminal) = terminal {
        let wanted = columns.iter().zip(&widths);
        let wanted = wanted.map(|(column, width)| Wanted {
            worth: column.worth(),
            width: Some(*width),
        });
        let (kept, _) = fit(&wanted.collect::<Vec<_>>(), terminal);
        let mut is_kept = kept.iter();
        columns.retain(|_| *is_kept.next().unwrap_or(&true));
        let mut is_kept = kept.iter();
        widths.retain(|_| *is_kept.next().unwrap_or(&true));
    }
    let mut write_row =
        |text: &dyn Fn(Column) -> String| writeln!(out, "{}", row(&columns, &widths, text));
    if !config.no_header {
        write_row(&|column| column.header().to_owned())?;
    }
    let mut connections = run.scan.connections.iter();
    connections.try_for_each(|connection| {
        write_row(&|column| column.text(connection, run, config.verbose))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::{config, run};
    use super::*;
    use crate::conntrack::Entry;
    use crate::model::ForwardedScan;
    use crate::tcp::Tuple;

    fn scan() -> ForwardedScan {
        let masqueraded = Entry {
            reply: Tuple {
                local: "10.9.2.2:7000".parse().unwrap(),
                peer: "10.9.2.1:1024".parse().unwrap(),
            },
            ..Entry::example("10.9.1.2:40000", "10.9.2.2:7000")
        };
        let routed = Entry {
            mark: Some(0x10),
            ..Entry::example("[fd00::1]:5", "[fd00:2::2]:7000")
        };
        let quiet = Some(Duration::from_secs(3_725));
        ForwardedScan {
            connections: vec![
                Forwarded::new(masqueraded, quiet),
                Forwarded::new(routed, None),
            ],
            table_use: Some((2, 1000)),
            ..ForwardedScan::default()
        }
    }

    fn written(line: &str, columns: Option<usize>) -> String {
        let mut out = Vec::new();
        write(&run(scan()), &config(line), columns, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_row_for_each_connection_with_both_sides_of_nat() {
        assert_eq!(
            written("", None),
            "\
SOURCE          DESTINATION       NAT-SRC        STATE          AGE  MARK
10.9.1.2:40000  10.9.2.2:7000     10.9.2.1:1024  ESTABLISHED  1h02m  0x0
[fd00::1]:5     [fd00:2::2]:7000  -              ESTABLISHED      -  0x10
2 forwarded connections
"
        );
        let plain = written("-H", None);
        assert!(plain.starts_with("10.9.1.2:40000  "), "{plain}");
        let all = written("-v", None);
        let first = all.lines().nth(1).unwrap();
        assert!(
            first.ends_with("4d23h  seen-reply,assured  0     00000007"),
            "{all}"
        );
    }

    #[test]
    fn a_terminal_without_room_shows_the_addresses() {
        let narrow = written("", Some(60));
        let header = narrow.lines().next().unwrap();
        assert_eq!(
            header,
            "SOURCE          DESTINATION       STATE          AGE"
        );
        let narrower = written("", Some(40));
        let header = narrower.lines().next().unwrap();
        assert_eq!(header, "SOURCE          DESTINATION");
    }
}
