//! The layers of `src/`: a module uses only modules that stand before it in [`LAYERS`], and no files of a folder use each other in a cycle.
//!
//! The mod.rs of a folder and the files of that folder may use each other: mod.rs holds types that they share, and re-exports
//! theirs. So a file that uses a name which mod.rs re-exports is not seen to use the file that defines the name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The modules from the lowest layer to the highest; `src/lib.rs` says what each is for.
const LAYERS: [&[&str]; 12] = [
    &["text", "sys", "kernel", "memory", "parallel", "netlink"],
    &["tcp"],
    &["bpf", "proc", "sock_diag", "routes", "conntrack", "packet"],
    &["model", "control"],
    &["filter"],
    &["privileges", "history", "finder"],
    &["injector", "reclaim", "drain"],
    &["diagnose", "check", "watch", "doctor", "trace"],
    &["cli", "config"],
    &["report", "audit"],
    &["daemon"],
    &["terminal", "commands"],
];

/// A source file with the modules it uses, as paths from the root of the crate.
struct Source {
    /// Its own path: `injector::rst::repair` for src/injector/rst/repair.rs, `injector` for src/injector/mod.rs.
    module: Vec<String>,
    uses: BTreeSet<Vec<String>>,
}

impl Source {
    fn new(module: &str, text: &str) -> Self {
        let module: Vec<String> = module.split("::").map(str::to_owned).collect();
        let uses = uses(&module, text);
        Source { module, uses }
    }
}

/// The modules that the code of `text` names by `crate::a::b` or `super::b`. Comments and test modules are left out.
fn uses(module: &[String], text: &str) -> BTreeSet<Vec<String>> {
    let code: String = without_tests(text)
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .map(|line| format!("{line}\n"))
        .collect();
    let mut uses = BTreeSet::new();
    // `super` is a part of the path, and `crate` is the start of it.
    for (prefix, skipped, base) in [
        ("crate::", "crate::".len(), &[][..]),
        ("super::", 0, module),
    ] {
        for (start, _) in code.match_indices(prefix) {
            let before = code[..start].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let found = paths(&code[start + skipped..]);
            uses.extend(found.iter().map(|path| resolved(base, path)));
        }
    }
    uses
}

/// The text without its inline test modules. The declaration of a test module in another file stays.
fn without_tests(text: &str) -> String {
    let mut parts = text.split("#[cfg(test)]\nmod ");
    let mut code = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let is_inline = part.lines().next().is_some_and(|line| line.ends_with('{'));
        // rustfmt puts the closing brace of a module at the start of a line.
        let kept = match is_inline {
            true => part.split_once("\n}").map_or("", |(_, after)| after),
            false => part,
        };
        code.push_str(kept);
    }
    code
}

/// The path that `path` means in the module `base`: each `super` is one module up.
fn resolved(base: &[String], path: &[String]) -> Vec<String> {
    let mut whole = base.to_vec();
    for name in path {
        match name == "super" {
            true => drop(whole.pop()),
            false => whole.push(name.clone()),
        }
    }
    whole
}

/// The paths at the start of `text`: `a::b::C` is one, `a::{b, c::D}` are two. Only names in lower case are modules.
fn paths(text: &str) -> Vec<Vec<String>> {
    let text = text.trim_start();
    let name: String = text
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect();
    if name.is_empty() {
        return match text.strip_prefix('{') {
            Some(list) => group(list).iter().flat_map(|one| paths(one)).collect(),
            None => vec![Vec::new()],
        };
    }
    if name == "self" || !name.starts_with(char::is_lowercase) {
        return vec![Vec::new()];
    }
    let rest = match text[name.len()..].strip_prefix("::") {
        Some(rest) => paths(rest),
        None => vec![Vec::new()],
    };
    rest.into_iter()
        .map(|path| [vec![name.clone()], path].concat())
        .collect()
}

/// The parts of a list in braces. `list` starts after the opening brace.
fn group(list: &str) -> Vec<String> {
    let (mut parts, mut depth) = (vec![String::new()], 0);
    for c in list.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        parts.last_mut().expect("there is one").push(c);
    }
    parts
}

fn files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("src can be listed") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => files(&path, into),
            false if path.extension().is_some_and(|it| it == "rs") => into.push(path),
            false => {}
        }
    }
}

/// The path of the module in the file at `relative` below src; `None` for the roots of the crates and for test code.
fn module_of(relative: &Path) -> Option<String> {
    let path = relative.with_extension("");
    let mut names: Vec<&str> = path.iter().filter_map(|name| name.to_str()).collect();
    let is_test = |name: &&str| matches!(*name, "tests" | "testdata") || name.ends_with("_tests");
    if names == ["lib"] || names == ["main"] || names.iter().any(is_test) {
        return None;
    }
    names.pop_if(|last| *last == "mod");
    Some(names.join("::"))
}

/// The source files of cwkill, at least one for each name in [`LAYERS`].
fn all_sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    files(&root, &mut paths);
    let source = |path: &PathBuf| {
        let module = module_of(path.strip_prefix(&root).expect("it is below src"))?;
        let text = fs::read_to_string(path).expect("a source file is text");
        Some(Source::new(&module, &text))
    };
    let sources: Vec<Source> = paths.iter().filter_map(source).collect();
    for name in LAYERS.concat() {
        let found = sources.iter().any(|source| source.module[0] == name);
        assert!(found, "src/{name} has no source file");
    }
    sources
}

/// The uses of modules that do not stand before the user in [`LAYERS`], as `user uses module`.
fn upward_uses(sources: &[Source]) -> Vec<String> {
    let order = LAYERS.concat();
    let place = |module: &str| order.iter().position(|known| *known == module);
    let mut wrong = Vec::new();
    for source in sources {
        let own = &source.module[0];
        let Some(own_place) = place(own) else {
            panic!("src/{own} has no place in LAYERS");
        };
        for path in &source.uses {
            let used_place = path.first().and_then(|name| place(name));
            if used_place > Some(own_place) {
                wrong.push(format!(
                    "{} uses {}",
                    source.module.join("::"),
                    path.join("::")
                ));
            }
        }
    }
    wrong
}

/// The files that use themselves through other files of the same folder.
fn cycles(sources: &[Source]) -> Vec<String> {
    // Folder, file in it, and the files beside it that it uses. A folder counts as a file of the folder that it is in.
    let mut folders: BTreeMap<&[String], BTreeMap<&String, BTreeSet<&String>>> = BTreeMap::new();
    for source in sources {
        for depth in 1..source.module.len() {
            let (folder, file) = (&source.module[..depth], &source.module[depth]);
            let beside = source.uses.iter().filter(|path| path.starts_with(folder));
            let beside = beside.filter_map(|path| path.get(depth));
            let files = folders.entry(folder).or_default();
            let uses = files.entry(file).or_default();
            uses.extend(beside.filter(|used| *used != file));
        }
    }
    let mut wrong = Vec::new();
    for (folder, files) in &folders {
        for file in files.keys() {
            let mut reached: BTreeSet<&String> = BTreeSet::new();
            let mut open = vec![*file];
            while let Some(next) = open.pop() {
                for used in files.get(next).into_iter().flatten() {
                    if reached.insert(used) {
                        open.push(used);
                    }
                }
            }
            if reached.contains(file) {
                wrong.push(format!("{}::{file}", folder.join("::")));
            }
        }
    }
    wrong
}

#[test]
fn a_module_uses_only_modules_of_lower_layers() {
    let wrong = upward_uses(&all_sources());
    assert!(wrong.is_empty(), "upward uses:\n{}", wrong.join("\n"));
}

#[test]
fn no_files_of_a_folder_use_each_other() {
    let wrong = cycles(&all_sources());
    assert!(wrong.is_empty(), "in a cycle:\n{}", wrong.join("\n"));
}

#[test]
fn an_upward_use_is_found() {
    let sources = [
        Source::new(
            "injector::plan",
            "use crate::model::Plan;\nuse crate::report::json;",
        ),
        Source::new("report::json", "use crate::injector;"),
        Source::new("finder", "use super::{\n    cli as options,\n    text,\n};"),
    ];
    let expected = ["injector::plan uses report::json", "finder uses cli"];
    assert_eq!(upward_uses(&sources), expected);
}

#[test]
fn a_cycle_is_found() {
    let sources = [
        // mod.rs is in no cycle with the files of its folder.
        Source::new("finder", "use crate::finder::dead;"),
        Source::new(
            "finder::dead",
            "use super::owners::Owners;\nuse crate::finder::Finder;",
        ),
        Source::new("finder::owners", "use crate::finder::listeners;"),
        Source::new("finder::listeners", "fn f() { super::dead::find() }"),
        // It uses files of the cycle, and they do not use it.
        Source::new("finder::sockets", "use super::{dead, owners};"),
        // A file in a folder and a file beside that folder.
        Source::new("injector::rst::repair", "use super::super::plan;"),
        Source::new("injector::plan", "use super::rst::Rst;"),
    ];
    let expected = [
        "finder::dead",
        "finder::listeners",
        "finder::owners",
        "injector::plan",
        "injector::rst",
    ];
    assert_eq!(cycles(&sources), expected);
}

#[test]
fn every_form_of_a_use_is_found() {
    let text = "\
#[cfg(test)]
mod golden_tests;
#[cfg(test)]
#[path = \"a_tests.rs\"]
mod tests;
pub use crate::{
    commands,
    report::json::{
        self as lines, line,
    },
};
use super::super::{text::counted, super::root};
// crate::comment
let a = super::engine::run();
#[cfg(test)]
mod inline {
    use crate::only_in_tests;
}
use crate::after_tests;
";
    let source = Source::new("injector::rst::repair", text);
    let found: Vec<String> = source.uses.iter().map(|path| path.join("::")).collect();
    for path in [
        "commands",
        "report::json",
        "report::json::line",
        "injector::text::counted",
        "root",
        "injector::rst::engine::run",
        "after_tests",
    ] {
        assert!(found.iter().any(|it| it == path), "{path}: {found:?}");
    }
    assert!(
        !found
            .iter()
            .any(|it| it == "comment" || it == "only_in_tests")
    );
}

#[test]
fn only_the_files_of_tests_are_left_out() {
    let module = |path: &str| module_of(Path::new(path));
    for (path, expected) in [
        ("text.rs", "text"),
        ("injector/mod.rs", "injector"),
        ("reclaim/ptrace/latest.rs", "reclaim::ptrace::latest"),
    ] {
        assert_eq!(module(path).as_deref(), Some(expected));
    }
    for path in [
        "tcp/segment_tests.rs",
        "sock_diag/codec/tests.rs",
        "proc/testdata.rs",
        "report/golden_tests/cases.rs",
    ] {
        assert_eq!(module(path), None, "{path}");
    }
}
