//! The places for people.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use anstyle::{AnsiColor, Style as Paint};

use crate::bpf::tracer::Opened;
use crate::report::table::place as place_of_process;
use crate::sys::monotonic;
use crate::text::{broken, columns_of, counted, escape, seconds};
use crate::trace::Trace;
use crate::trace::places::{Place, Places};
use crate::trace::stack::{End, Frame, Origin, Stack};

/// How the report looks.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// The width of the terminal, if it is one.
    pub columns: Option<usize>,
    pub color: bool,
    /// Every place, and every function of its stack.
    pub verbose: bool,
}

/// Places that are shown without `-v`.
const MAX_PLACES: usize = 5;
/// Functions of a stack that are shown without `-v`.
const MAX_FRAMES: usize = 8;
/// Sockets that are named as examples.
const MAX_EXAMPLES: usize = 2;

/// Writes the report.
pub fn write(
    trace: &Trace,
    found: &Places<'_>,
    style: Style,
    out: &mut dyn Write,
) -> io::Result<()> {
    for line in broken(&summary(trace, found), style.columns) {
        writeln!(out, "{line}")?;
    }
    let most = match style.verbose {
        true => usize::MAX,
        false => MAX_PLACES,
    };
    for (number, place) in (1..).zip(found.places.iter().take(most)) {
        writeln!(out)?;
        write_place(number, place, found, style, out)?;
    }
    let rest = found.places.iter().skip(most);
    if rest.len() > 0 {
        let sockets: usize = rest.clone().map(|place| place.sockets.len()).sum();
        let (places, sockets) = (counted(rest.len(), "place"), counted(sockets, "socket"));
        writeln!(out, "\nand {places} more with {sockets}: -v shows all")?;
    }
    Ok(())
}

fn summary(trace: &Trace, found: &Places<'_>) -> String {
    let time = seconds(Duration::from_secs(trace.lasted.as_secs().max(1)));
    let new = match found.new {
        0 => format!("no socket became stuck in {time} and still is"),
        count => format!(
            "{} became stuck in {time} and still {}",
            counted(count, "socket"),
            if count == 1 { "is" } else { "are" }
        ),
    };
    match found.before {
        0 => new,
        1 => format!("{new}; 1 was stuck before, and its place cannot be known"),
        count => format!("{new}; {count} were stuck before, and their places cannot be known"),
    }
}

fn write_place(
    number: usize,
    place: &Place<'_>,
    found: &Places<'_>,
    style: Style,
    out: &mut dyn Write,
) -> io::Result<()> {
    let count = place.sockets.len();
    let process = match &place.process {
        Some(process) => match place_of_process(&process.cgroup) {
            Some(place) => format!("{process} ({})", escape(&place)),
            None => process.to_string(),
        },
        None => format!("process {}", place.pid),
    };
    let (first, last) = place.times();
    let (first, last) = (clock(first), clock(last));
    let when = match first == last {
        true => format!("since {first}"),
        false => format!("from {first} to {last}"),
    };
    let head = format!(
        "{number}. {process}: {count} of {} ({} %), stuck {when}",
        found.known(),
        percent(count, found.known())
    );
    for line in broken(&head, style.columns) {
        let bold = Paint::new().bold();
        writeln!(out, "{}", painted(&line, bold, style))?;
    }
    let example = |(target, _): &(&crate::model::Target, _)| {
        let socket = &target.socket;
        let fd = target.owners.first().map(|owner| owner.fd.0);
        let fd = fd.map_or_else(String::new, |fd| format!(" (fd {fd})"));
        format!(
            "{} - {}{fd}",
            socket.id.tuple().local,
            socket.id.tuple().peer
        )
    };
    let examples: Vec<String> = place
        .sockets
        .iter()
        .take(MAX_EXAMPLES)
        .map(example)
        .collect();
    let examples = format!("   for example {}", examples.join(", "));
    for line in broken(&examples, style.columns) {
        writeln!(out, "{line}")?;
    }
    match place.read {
        Some(stack) => {
            writeln!(out, "   read the end here, and did not close:")?;
            write_stack(stack, style, out)?;
        }
        None => writeln!(out, "   nobody has read the end")?,
    }
    if let Some((how, stack)) = place.opened {
        let how = match how {
            Opened::Connected => "connected",
            Opened::Accepted => "accepted",
        };
        writeln!(out, "   {how} here:")?;
        write_stack(stack, style, out)?;
    }
    Ok(())
}

fn write_stack(stack: &Stack, style: Style, out: &mut dyn Write) -> io::Result<()> {
    let marked = stack.first_own();
    let shown = frames_shown(stack, style.verbose);
    for (at, frame) in stack.frames.iter().enumerate().take(shown) {
        let mark = match Some(at) == marked {
            true => "   > ",
            false => "     ",
        };
        let room = style
            .columns
            .map(|columns| columns.saturating_sub(mark.len()));
        let line = format!("{mark}{}", frame_text(frame, room));
        let paint = match frame.origin {
            Origin::Runtime => Paint::new().dimmed(),
            Origin::Own if Some(at) == marked => Paint::new().fg_color(Some(AnsiColor::Red.into())),
            Origin::Own => Paint::new(),
        };
        for line in broken(&line, style.columns) {
            writeln!(out, "{}", painted(&line, paint, style))?;
        }
    }
    let rest = stack.frames.len() - shown;
    if rest > 0 {
        return writeln!(
            out,
            "     and {} more: -v shows all",
            counted(rest, "caller")
        );
    }
    match stack.end {
        End::Whole => Ok(()),
        End::Cut => writeln!(
            out,
            "     (its callers are beyond the part that was copied)"
        ),
        End::Lost => writeln!(out, "     (its callers are not known)"),
    }
}

/// As many as fit, and up to the function after the first of the program's own.
fn frames_shown(stack: &Stack, all: bool) -> usize {
    let len = stack.frames.len();
    let least = stack.first_own().map_or(0, |own| own + 2);
    match all {
        true => len,
        // A line that says that one more is there takes as much room as that one.
        false if len <= MAX_FRAMES + 1 => len,
        false => least.max(MAX_FRAMES).min(len),
    }
}

/// The function, and its file and line, or the file that has the code. The directory of the file is left out where it is of no use, or has
/// no room.
fn frame_text(frame: &Frame, room: Option<usize>) -> String {
    let whole = escape(&with_place(frame, frame.origin == Origin::Own));
    match room.is_some_and(|room| columns_of(&whole) > room) {
        true => escape(&with_place(frame, false)),
        false => whole,
    }
}

fn with_place(frame: &Frame, with_directory: bool) -> String {
    let base = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
    let module = frame.module.as_deref().map(base);
    let place = match (&frame.file, frame.line) {
        (Some(file), line) => {
            let file = match with_directory {
                true => file.clone(),
                false => base(file),
            };
            let line = line.map_or_else(String::new, |line| format!(":{line}"));
            file + &line
        }
        (None, _) => match &module {
            Some(module) => format!("{module}+{:#x}", frame.address),
            None => format!("{:#x}", frame.address),
        },
    };
    let function = frame.function.as_deref().unwrap_or("?");
    let inlined = if frame.inlined { " (inlined)" } else { "" };
    format!("{function}{inlined}  {place}")
}

fn painted(text: &str, paint: Paint, style: Style) -> String {
    match style.color {
        true => format!("{paint}{text}{paint:#}"),
        false => text.to_owned(),
    }
}

fn percent(part: usize, whole: usize) -> usize {
    match whole {
        0 => 0,
        whole => (100 * part + whole / 2) / whole,
    }
}

/// The time of day in UTC of a time of CLOCK_MONOTONIC.
fn clock(at: Duration) -> String {
    let ago = monotonic().saturating_sub(at);
    let time = SystemTime::now().checked_sub(ago);
    let text =
        humantime::format_rfc3339_seconds(time.unwrap_or(SystemTime::UNIX_EPOCH)).to_string();
    text.split('T').nth(1).unwrap_or(&text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(function: &str, origin: Origin) -> Frame {
        Frame {
            function: Some(function.into()),
            file: None,
            line: None,
            module: Some("/srv/app".into()),
            address: 0x1234,
            inlined: false,
            origin,
        }
    }

    #[test]
    fn a_share_is_rounded() {
        assert_eq!(percent(38, 40), 95);
        assert_eq!(percent(2, 3), 67);
        assert_eq!(percent(0, 0), 0);
    }

    #[test]
    fn a_frame_without_lines_has_its_address() {
        let mut frame = frame("leak", Origin::Own);
        assert_eq!(frame_text(&frame, None), "leak  app+0x1234");
        (frame.file, frame.line) = (Some("/src/a.c".into()), Some(9));
        assert_eq!(frame_text(&frame, None), "leak  /src/a.c:9");
        assert_eq!(frame_text(&frame, Some(16)), "leak  /src/a.c:9");
        assert_eq!(frame_text(&frame, Some(15)), "leak  a.c:9");
        frame.origin = Origin::Runtime;
        assert_eq!(frame_text(&frame, None), "leak  a.c:9");
    }

    /// A name comes from a file that may be hostile.
    #[test]
    fn a_name_cannot_move_the_cursor() {
        let text = frame_text(&frame("a\u{1b}[2Jb\nc", Origin::Own), None);
        assert!(!text.contains(['\u{1b}', '\n']), "{text}");
    }

    #[test]
    fn the_programs_own_function_is_always_shown() {
        let mut frames = vec![frame("r", Origin::Runtime); 20];
        frames.push(frame("own", Origin::Own));
        frames.push(frame("caller", Origin::Own));
        frames.push(frame("main", Origin::Own));
        let stack = Stack {
            frames,
            end: End::Whole,
        };
        assert_eq!(frames_shown(&stack, false), 22);
        assert_eq!(frames_shown(&stack, true), 23);
    }
}
