//! The reports of hand-built runs, compared byte for byte with the files in `golden/`.
//!
//! `NAME.txt` has the texts for people: tables, notes, hints, summary, exit status and the sentences of the audit log.
//! `NAME.json` is the JSON document, broken into lines between its values; `NAME.jsonl` are the JSON lines; `NAME.audit.jsonl` are
//! the records of the audit log. `CWKILL_RENEW_GOLDEN=1 cargo test --lib golden` writes them anew.

pub(crate) mod builder;
mod cases;
mod dead_builder;
mod screens;
mod words;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::overview::Screen;
use super::{exit_status, json, notes, reclaim, text};
use builder::{Case, records};
use cases::{acts, dead_cases, listings, plans, reclaims};
use dead_builder::{DeadCase, dead_records};
use screens::{check, check_width, many, screens, shown};

use crate::audit::record::{Caller, Entry};
use crate::config::{Action, Format};
use crate::history::fnv_1a;
use crate::model::{Privilege, TimeAndPlace};
use crate::privileges::hint;

#[test]
fn every_output_is_as_it_was() {
    let mut golden = Golden::default();
    for case in [listings(), plans(), acts(), reclaims()]
        .into_iter()
        .flatten()
    {
        for (ending, text) in outputs(&case) {
            golden.compare(case.name, ending, &text);
        }
    }
    for case in dead_cases() {
        for (ending, text) in dead_outputs(&case) {
            golden.compare(case.name, ending, &text);
        }
    }
    for case in screens() {
        golden.compare(case.name, "screens.txt", &shown(&case));
    }
    golden.end();
}

/// The first block has only small numbers, the second has large ones.
#[test]
fn the_columns_of_all_blocks_are_aligned() {
    let case = many("many", "", 1001);
    let table = written(|out| text::write(&case.run(true), &case.config(false), false, None, out));
    let rows = table.lines().filter(|line| line.starts_with("java"));
    let columns: BTreeSet<_> = rows.filter_map(|row| row.find("unread")).collect();
    assert!(table.contains("4000000"), "{table}");
    assert_eq!(columns.len(), 1, "{columns:?}");
}

/// How a table can be shown: with `-v`, in colour, and the options that say so.
const LOOKS: [(bool, bool, &str); 3] = [
    (false, false, ""),
    (true, false, " -v"),
    (false, true, " --color always"),
];

type Outputs = Vec<(&'static str, String)>;

/// All that is shown of a run, by the ending of its file.
fn outputs(case: &Case) -> Outputs {
    let run = case.run(true);
    let mut prose = String::new();
    for (verbose, color, how) in LOOKS {
        let config = case.config(verbose);
        if (color && !case.colored) || config.format == Format::Quiet {
            continue;
        }
        let table = written(|out| text::write(&run, &config, color, None, out));
        section(
            &mut prose,
            format!("cwkill {}{how}", case.arguments).trim_end(),
            &table,
        );
    }
    let config = case.config(false);
    let all = config.notes.iter().cloned().chain(notes::notes(&run));
    section(&mut prose, "notes", &lines(all));
    section(
        &mut prose,
        "missing privileges",
        &hints(notes::missing_privileges(&run)),
    );
    section(&mut prose, "summary", &text::summary(&run, &config));
    if let Some(new) = &run.new_sockets {
        section(&mut prose, "watched", &new.line(&config.selectors));
    }
    section(&mut prose, "exit status", &status(exit_status(&run)));
    let mut outputs = Vec::new();
    if config.action == Action::Act {
        let (caller, before) = (Caller::example(), case.run(false));
        let mut entries = records(&before, &caller, false);
        entries.extend(records(&run, &caller, true));
        section(&mut prose, "audit", &sentences(&entries));
        outputs.push(("audit.jsonl", log(&caller, &entries)));
    }
    outputs.push(("txt", prose));
    if config.format == Format::Quiet {
        return outputs;
    }
    outputs.push((
        "json",
        unfolded(&written(|out| {
            json::write_document(&run, &time_and_place(), out)
        })),
    ));
    outputs.push((
        "jsonl",
        written(|out| json::write_lines(&run, &time_and_place(), out)),
    ));
    if case.long {
        outputs
            .iter_mut()
            .for_each(|(_, text)| *text = elided(text));
    }
    outputs
}

/// The same of a run of `cwkill reclaim`.
fn dead_outputs(case: &DeadCase) -> Outputs {
    let run = case.run(true);
    let mut prose = String::new();
    for (verbose, color, how) in LOOKS {
        let config = case.config(verbose);
        if (color && !case.colored) || config.format == Format::Quiet {
            continue;
        }
        let table = written(|out| reclaim::text::write(&run, &config, color, None, out));
        section(
            &mut prose,
            format!("cwkill reclaim {}{how}", case.arguments).trim_end(),
            &table,
        );
    }
    let config = case.config(false);
    if config.format != Format::Quiet {
        for (columns, rows) in [(80, 24), (40, 24)] {
            let screen = Screen {
                columns,
                rows,
                color: false,
                ascii: true,
            };
            let words = format!("reclaim {}", case.arguments);
            let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
            let next = reclaim::next::line(&run, &config, &words);
            let mut shown = written(|out| {
                reclaim::screen::write(&run, &config, screen, &[], next.as_ref(), out)
            });
            shown.extend(next.iter().map(|next| format!("{next}\n")));
            check(&shown, screen);
            section(&mut prose, &format!("{columns}x{rows}"), &shown);
        }
        for columns in [80, 50] {
            let config = case.config(true);
            let shown =
                written(|out| reclaim::text::write(&run, &config, false, Some(columns), out));
            check_width(&shown, columns);
            section(&mut prose, &format!("-v with {columns} columns"), &shown);
        }
    }
    section(&mut prose, "notes", &lines(reclaim::notes(&run)));
    let lacking = reclaim::lacks_privileges(&run).then_some(Privilege::Ptrace);
    section(&mut prose, "missing privileges", &hints(lacking));
    section(&mut prose, "summary", &reclaim::summary(&run, &config));
    section(
        &mut prose,
        "exit status",
        &status(reclaim::exit_status(&run)),
    );
    let mut outputs = Vec::new();
    if config.action == Action::Act {
        let (caller, before) = (Caller::example(), case.run(false));
        let mut entries = dead_records(&before, &caller, false);
        entries.extend(dead_records(&run, &caller, true));
        section(&mut prose, "audit", &sentences(&entries));
        outputs.push(("audit.jsonl", log(&caller, &entries)));
    }
    outputs.push(("txt", prose));
    if config.format == Format::Quiet {
        return outputs;
    }
    outputs.push((
        "json",
        unfolded(&written(|out| {
            reclaim::json::write_document(&run, &time_and_place(), out)
        })),
    ));
    outputs.push((
        "jsonl",
        written(|out| reclaim::json::write_lines(&run, &time_and_place(), out)),
    ));
    outputs
}

/// Neither the time nor the host of the tests.
fn time_and_place() -> TimeAndPlace {
    TimeAndPlace {
        time: SystemTime::UNIX_EPOCH + Duration::from_millis(1_500),
        host: "db1".to_owned(),
        boot_id: Some("01234567-89ab-cdef-0123-456789abcdef".to_owned()),
    }
}

fn written(write: impl FnOnce(&mut dyn std::io::Write) -> std::io::Result<()>) -> String {
    let mut bytes = Vec::new();
    write(&mut bytes).expect("memory takes everything");
    let text = String::from_utf8(bytes).expect("UTF-8");
    // The version is the only thing that differs from one release to the next.
    let version = concat!("\"cwkill_version\":\"", env!("CARGO_PKG_VERSION"), "\"");
    text.replacen(version, "\"cwkill_version\":\"VERSION\"", 1)
}

/// Adds text under a title; the escapes of colours are made visible.
fn section(prose: &mut String, title: &str, text: &str) {
    let text = text.replace('\x1b', "<ESC>");
    let end = if text.is_empty() || text.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    let _ = write!(prose, "=== {title}\n{text}{end}");
}

fn lines(lines: impl IntoIterator<Item = String>) -> String {
    lines.into_iter().map(|line| line + "\n").collect()
}

/// What a user is told, and root.
fn hints(missing: impl IntoIterator<Item = Privilege>) -> String {
    let missing: Vec<Privilege> = missing.into_iter().collect();
    let hints = [false, true].map(|is_root| hint(&missing, &[], is_root, false));
    lines(hints.into_iter().flatten())
}

fn status(status: super::ExitStatus) -> String {
    format!("{} {status:?}", status as u8)
}

/// The sentence of each record, and what the journal has as fields.
fn sentences(entries: &[Entry<'_>]) -> String {
    let sentence = |entry: &Entry<'_>| {
        let fields = [
            entry.outcome().map(str::to_owned),
            entry.method().map(str::to_owned),
            entry.local(),
            entry.peer(),
            entry.cookie().map(str::to_owned),
        ];
        let fields = fields.map(|field| field.unwrap_or_else(|| "-".into()));
        let (failure, intent) = (entry.is_failure(), entry.is_intent());
        let fields = format!(
            "{} {} failure={failure} intent={intent}",
            entry.event(),
            fields.join(" ")
        );
        format!("{}\n    {fields}", entry.message())
    };
    lines(entries.iter().map(sentence))
}

fn log(caller: &Caller, entries: &[Entry<'_>]) -> String {
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_500);
    lines(entries.iter().map(|entry| caller.line(entry, time)))
}

/// A document with the values of its outer two levels on lines of their own; no other byte is changed.
fn unfolded(document: &str) -> String {
    const LEVELS: usize = 2;
    let document = document.strip_suffix('\n').expect("a line");
    assert!(!document.contains('\n'), "one line");
    let (mut out, mut depth) = (String::new(), 0);
    let (mut quoted, mut escaped, mut last) = (false, false, ' ');
    let line = |depth: usize| format!("\n{}", "  ".repeat(depth));
    for c in document.chars() {
        match c {
            '}' | ']' if !quoted => {
                depth -= 1;
                if depth < LEVELS && !"{[".contains(last) {
                    out += &line(depth);
                }
            }
            _ if !quoted && "{[,".contains(last) && (1..=LEVELS).contains(&depth) => {
                out += &line(depth)
            }
            _ => {}
        }
        out.push(c);
        match c {
            '"' if !escaped => quoted = !quoted,
            '{' | '[' if !quoted => depth += 1,
            _ => {}
        }
        escaped = c == '\\' && !escaped;
        last = if quoted { ' ' } else { c };
    }
    out + "\n"
}

/// The first and the last lines, and a hash of the others.
fn elided(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let (head, rest) = lines.split_at(lines.len().min(10));
    let (middle, tail) = rest.split_at(rest.len().saturating_sub(30));
    let bytes = middle.iter().flat_map(|line| line.bytes().chain([b'\n']));
    let sum = fnv_1a(bytes.map(u64::from));
    let note = format!("... {} lines with the sum {sum:016x} ...", middle.len());
    let mut text = [head, &[note.as_str()], tail].concat().join("\n");
    text.push('\n');
    text
}

/// The files of what is expected.
#[derive(Default)]
struct Golden {
    seen: BTreeSet<PathBuf>,
    differences: String,
}

impl Golden {
    fn folder() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src/report/golden"))
    }

    fn renews() -> bool {
        std::env::var_os("CWKILL_RENEW_GOLDEN").is_some_and(|value| value == "1")
    }

    fn compare(&mut self, name: &str, ending: &str, actual: &str) {
        // Nothing has no file; that of something that is nothing now belongs to no case.
        if actual.is_empty() {
            return;
        }
        let path = Self::folder().join(format!("{name}.{ending}"));
        assert!(self.seen.insert(path.clone()), "two cases are named {name}");
        if Self::renews() {
            fs::create_dir_all(Self::folder()).expect("a folder");
            fs::write(&path, actual).expect("a file that can be written");
            return;
        }
        let shown = format!("src/report/golden/{name}.{ending}");
        let text = match fs::read_to_string(&path) {
            Err(error) => format!("{shown}: {error}\n"),
            Ok(expected) if expected == actual => return,
            Ok(expected) => format!(
                "{shown} (- expected, + actual)\n{}",
                difference(&expected, actual)
            ),
        };
        self.differences += &text;
    }

    /// Fails if anything differed, or a file belongs to no case.
    fn end(self) {
        let files = fs::read_dir(Self::folder()).expect("a folder");
        let mut differences = self.differences;
        for file in files.map(|entry| entry.expect("an entry").path()) {
            if self.seen.contains(&file) {
                continue;
            }
            match Self::renews() {
                true => fs::remove_file(&file).expect("a file that can be removed"),
                false => {
                    let _ = writeln!(differences, "{}: no case has this file", file.display());
                }
            }
        }
        assert!(
            differences.is_empty(),
            "\n{differences}(CWKILL_RENEW_GOLDEN=1 writes the files anew)"
        );
    }
}

/// Lines of a file that are shown at most where they differ.
const SHOWN: usize = 10;

/// The lines that differ, long ones from shortly before the place where they do.
fn difference(expected: &str, actual: &str) -> String {
    let (expected, actual): (Vec<_>, Vec<_>) =
        (expected.split('\n').collect(), actual.split('\n').collect());
    let equal = |(a, b): &(&&str, &&str)| a == b;
    let same_start = expected.iter().zip(&actual).take_while(equal).count();
    let (old, new) = (&expected[same_start..], &actual[same_start..]);
    let same_end = old
        .iter()
        .rev()
        .zip(new.iter().rev())
        .take_while(equal)
        .count();
    let (old, new) = (&old[..old.len() - same_end], &new[..new.len() - same_end]);
    let mut out = String::new();
    let all = 0..old.len().max(new.len());
    let different: Vec<usize> = all.filter(|&at| old.get(at) != new.get(at)).collect();
    for &at in different.iter().take(SHOWN) {
        let (old, new) = (old.get(at), new.get(at));
        let (a, b) = (
            old.copied().unwrap_or_default(),
            new.copied().unwrap_or_default(),
        );
        let same = a.chars().zip(b.chars()).take_while(|(a, b)| a == b).count();
        let part = |line: &str| -> String {
            line.chars()
                .skip(same.saturating_sub(40))
                .take(200)
                .collect()
        };
        let _ = writeln!(out, "  line {}, column {}", same_start + at + 1, same + 1);
        for (sign, line) in [('-', old), ('+', new)] {
            if let Some(line) = line {
                let _ = writeln!(out, "  {sign} {}", part(line));
            }
        }
    }
    if different.len() > SHOWN {
        let _ = writeln!(out, "  and {} more lines", different.len() - SHOWN);
    }
    out
}

#[test]
fn a_document_is_unfolded_between_its_values() {
    let text = unfolded("{\"a\":[{\"b,{\\\"\":[1,2]},{}],\"c\":[],\"d\":{\"e\":1}}\n");
    let wanted = "{\n  \"a\":[\n    {\"b,{\\\"\":[1,2]},\n    {}\n  ],\n  \"c\":[],\n  \"d\":{\n    \"e\":1\n  }\n}\n";
    assert_eq!(text, wanted);
}

#[test]
fn a_difference_names_its_lines() {
    let text = difference("a\nb\nc\n", "a\nB\nc\n");
    assert_eq!(text, "  line 2, column 1\n  - b\n  + B\n");
    assert_eq!(difference("a\n", "a\nb\n"), "  line 2, column 1\n  + b\n");
    let many = difference(&"a\n".repeat(SHOWN + 2), &"b\n".repeat(SHOWN + 2));
    assert!(many.ends_with("  + b\n  and 2 more lines\n"), "{many}");
}
