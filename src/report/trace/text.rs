//! The places for people.

use std::io::{self, Write};
use std::ops::Range;
use std::time::Duration;

use anstyle::{AnsiColor, Style as Paint};

use super::clock;
use crate::bpf::tracer::Opened;
use crate::model::Target;
use crate::report::table::place as place_of_process;
use crate::text::{columns_of, counted, escape, seconds, wrap};
use crate::trace::Trace;
use crate::trace::origin::Origin;
use crate::trace::places::{self, Place, Places, Stuck, Unread};
use crate::trace::stack::{End, Frame, Stack};

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
/// Callers of the first function of the program's own that are shown without `-v`.
const MAX_CALLERS: usize = 3;
/// Functions that are shown without `-v` if none is the program's own.
const MAX_FRAMES: usize = 6;
/// The spaces before the later rows of a line that is broken.
const INDENT: usize = 7;
/// Sockets that are named as examples.
const MAX_EXAMPLES: usize = 2;

/// Writes the report.
pub fn write(
    trace: &Trace,
    found: &Places<'_>,
    style: Style,
    out: &mut dyn Write,
) -> io::Result<()> {
    for line in rows(&summary(trace, found), style) {
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
    if !found.unread.is_empty() {
        writeln!(out)?;
    }
    for unread in &found.unread {
        for line in rows(&unread_line(unread), style) {
            writeln!(out, "{line}")?;
        }
    }
    Ok(())
}

/// The rows of a line.
fn rows(line: &str, style: Style) -> Vec<String> {
    match style.columns {
        Some(columns) => wrap(line, columns, INDENT),
        None => vec![line.to_owned()],
    }
}

fn unread_line(unread: &Unread) -> String {
    let process = match &unread.process {
        Some(process) => process.to_string(),
        None => "an unknown process".to_owned(),
    };
    let what = match unread.not_accepted {
        true => "has not accepted",
        false => "has not read to the end of",
    };
    format!("{process} {what} {}", counted(unread.count, "socket"))
}

/// The descriptor of a socket in the process with this pid.
pub(super) fn fd_in(target: &Target, pid: i32) -> Option<i32> {
    let mut owners = target.owners.iter();
    let owner = owners.find(|owner| owner.process.id.pid == pid);
    owner.map(|owner| owner.fd.0)
}

fn summary(trace: &Trace, found: &Places<'_>) -> String {
    let time = seconds(Duration::from_secs(trace.lasted.as_secs().max(1)));
    let mut text = match found.new {
        0 => format!("no socket became stuck in {time} and stayed so"),
        count => format!(
            "{} became stuck in {time} and stayed so",
            counted(count, "socket")
        ),
    };
    if found.unknown > 0 {
        text += &format!("; no stack is known of {}", found.unknown);
    }
    match found.before {
        0 => text,
        1 => text + "; 1 was stuck before, and its place cannot be known",
        count => text + &format!("; {count} were stuck before, and their places cannot be known"),
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
    let (traced, process) = place.process();
    let mut name = match process {
        Some(process) => match place_of_process(&process.cgroup) {
            Some(place) => format!("{process} ({})", escape(&place)),
            None => process.to_string(),
        },
        None => format!("process {}", traced.pid),
    };
    if place.processes.len() > 1 {
        name += &format!(" and {} more", place.processes.len() - 1);
    }
    let times = place.times();
    let when = match times.map(|(first, last)| (clock(first), clock(last))) {
        None => String::new(),
        Some((first, last)) if first == last => format!(", stuck since {first}"),
        Some((first, last)) => format!(", stuck from {first} to {last}"),
    };
    let share = percent(place.share);
    let part = match place.end {
        places::End::ReadAt(_) if found.unknown > 0 => {
            format!("about {share} % ({count} with a known stack)")
        }
        _ => format!("{count} of {} ({share} %)", found.new),
    };
    let head = format!("{number}. {name}: {part}{when}");
    for line in rows(&head, style) {
        let bold = Paint::new().bold();
        writeln!(out, "{}", painted(&line, bold, style))?;
    }
    let example = |stuck: &Stuck<'_>| {
        let socket = &stuck.target.socket;
        let fd = fd_in(stuck.target, stuck.traced.pid);
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
    for line in rows(&examples, style) {
        writeln!(out, "{line}")?;
    }
    match place.end {
        places::End::ReadAt(stack) => {
            writeln!(
                out,
                "   read the end here and did not close (your code is at >):"
            )?;
            write_stack(stack, style, out)?;
        }
        places::End::Read => writeln!(out, "   the end was read; where was not seen")?,
        places::End::NotRead => writeln!(out, "   nobody has read the end")?,
    }
    if let Some((how, stack)) = place.opened {
        let how = match how {
            Opened::Connected => "connected",
            Opened::Accepted => "accepted",
        };
        writeln!(out, "   one of them was {how} here:")?;
        write_stack(stack, style, out)?;
    }
    Ok(())
}

fn write_stack(stack: &Stack, style: Style, out: &mut dyn Write) -> io::Result<()> {
    let marked = stack.first_own();
    let shown = frames_shown(stack, style.verbose);
    for (at, frame) in stack.frames.iter().enumerate() {
        if !shown.contains(&at) {
            continue;
        }
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
        for line in rows(&line, style) {
            writeln!(out, "{}", painted(&line, paint, style))?;
        }
    }
    let left_out = stack.frames.len() - shown.len();
    if left_out > 0 {
        let functions = counted(left_out, "function");
        writeln!(out, "     ({functions} not shown: -v shows all)")?;
    }
    match stack.end {
        End::Whole => Ok(()),
        End::Cut => writeln!(
            out,
            "     (the stack goes on beyond what cwkill keeps of it)"
        ),
        End::Lost => writeln!(out, "     (it is not known who called this)"),
    }
}

/// The first function of the program's own, what it has called, and some of its callers.
fn frames_shown(stack: &Stack, all: bool) -> Range<usize> {
    let len = stack.frames.len();
    let shown = match (all, stack.first_own()) {
        (true, _) => 0..len,
        (false, Some(own)) => own.saturating_sub(1)..(own + 1 + MAX_CALLERS).min(len),
        (false, None) => 0..MAX_FRAMES.min(len),
    };
    // A line that says that one more is there takes as much room as that one.
    match len - shown.len() {
        0 | 1 => 0..len,
        _ => shown,
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

fn percent(share: f64) -> String {
    format!("{:.0}", share * 100.0)
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
        assert_eq!(percent(0.95), "95");
        assert_eq!(percent(2.0 / 3.0), "67");
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
        assert_eq!(frames_shown(&stack, false), 19..23);
        assert_eq!(frames_shown(&stack, true), 0..23);
    }
}
