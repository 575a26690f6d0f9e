//! The layers of `src/`: a module uses only modules that stand before it in [`LAYERS`], and no two files of one folder use each other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The modules from the lowest layer to the highest; `src/lib.rs` says what each is for.
const LAYERS: [&[&str]; 11] = [
    &["text", "sys", "kernel", "parallel"],
    &["tcp"],
    &["proc", "sock_diag", "packet"],
    &["model", "control"],
    &["filter"],
    &["finder", "privileges"],
    &["injector", "reclaim"],
    &["diagnose", "check", "watch", "doctor"],
    &["cli", "config"],
    &["report", "audit"],
    &["terminal", "commands"],
];

/// A source file with the modules it uses, as paths from the root of the crate.
struct Source {
    /// Its own path: `injector::rst::repair` for src/injector/rst/repair.rs, `injector` for src/injector/mod.rs.
    module: Vec<String>,
    uses: BTreeSet<Vec<String>>,
}

fn sources(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("src can be listed") {
        let path = entry.expect("an entry").path();
        match path.is_dir() {
            true => sources(&path, into),
            false if path.extension().is_some_and(|it| it == "rs") => into.push(path),
            false => {}
        }
    }
}

/// The crate's modules that the code of `text` names by `crate::a::b` or `super::b`, tests and comments left out.
fn uses(module: &[String], is_folder: bool, text: &str) -> BTreeSet<Vec<String>> {
    let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let parent = match is_folder {
        true => module.to_vec(),
        false => module[..module.len() - 1].to_vec(),
    };
    // `super` of src/a/mod.rs is the root, of src/a/b.rs it is `a`.
    let above = match is_folder {
        true => &module[..module.len() - 1],
        false => &parent[..],
    };
    let mut uses = BTreeSet::new();
    let code: String = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .map(|line| format!("{line}\n"))
        .collect();
    for (prefix, base) in [("crate::", &[][..]), ("super::", above)] {
        for (at, _) in code.match_indices(prefix) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            uses.extend(paths(&code[at + prefix.len()..]).into_iter().map(|path| {
                let mut whole = base.to_vec();
                whole.extend(path);
                whole
            }));
        }
    }
    uses
}

/// The paths at the begin of `text`: `a::b::C` is one, `a::{b, c::D}` are two. Only names in lower case are modules.
fn paths(text: &str) -> Vec<Vec<String>> {
    let name: String = text
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect();
    if name.is_empty() {
        return match text.strip_prefix('{') {
            Some(list) => group(list)
                .into_iter()
                .flat_map(|one| paths(&one))
                .collect(),
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

/// The parts of a list in braces, of which the first is already open.
fn group(list: &str) -> Vec<String> {
    let (mut parts, mut depth) = (vec![String::new()], 0);
    for c in list.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => parts.push(String::new()),
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if !(c.is_whitespace() || c == ',' && depth == 0) {
            parts.last_mut().expect("there is one").push(c);
        }
    }
    parts
}

fn all_sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    files
        .iter()
        .filter(|path| !path.to_string_lossy().contains("test"))
        .filter_map(|path| {
            let relative = path.strip_prefix(&root).expect("it is below src");
            let mut module: Vec<String> = relative
                .with_extension("")
                .iter()
                .map(|part| part.to_string_lossy().into_owned())
                .collect();
            let is_folder = module.last().is_some_and(|last| last == "mod");
            if is_folder {
                module.pop();
            }
            if module == ["lib"] || module == ["main"] {
                return None;
            }
            let text = fs::read_to_string(path).expect("a source file is text");
            let uses = uses(&module, is_folder, &text);
            Some(Source { module, uses })
        })
        .collect()
}

#[test]
fn a_module_uses_only_modules_of_lower_layers() {
    let order: Vec<&str> = LAYERS
        .iter()
        .flat_map(|layer| layer.iter().copied())
        .collect();
    let place = |module: &str| order.iter().position(|known| *known == module);
    let mut wrong = Vec::new();
    for source in all_sources() {
        let own = &source.module[0];
        let Some(own_place) = place(own) else {
            panic!("src/{own} has no place in LAYERS");
        };
        for used in source.uses.iter().filter_map(|path| path.first()) {
            if place(used).is_some_and(|used_place| used_place > own_place) {
                wrong.push(format!("{} uses {used}", source.module.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "upward uses:\n{}", wrong.join("\n"));
}

#[test]
fn no_two_files_of_a_folder_use_each_other() {
    // Folder, file in it, and the files beside it that it uses.
    let mut folders: BTreeMap<Vec<String>, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for source in all_sources() {
        for depth in 1..source.module.len() {
            let (folder, file) = (&source.module[..depth], &source.module[depth]);
            let beside = source.uses.iter().filter(|path| path.starts_with(folder));
            let beside = beside.filter_map(|path| path.get(depth));
            let files = folders.entry(folder.to_vec()).or_default();
            let uses = files.entry(file.clone()).or_default();
            uses.extend(beside.filter(|used| *used != file).cloned());
        }
    }
    let mut wrong = Vec::new();
    for (folder, files) in &folders {
        for file in files.keys() {
            let mut reached: BTreeSet<&String> = BTreeSet::new();
            let mut open = vec![file];
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
    assert!(wrong.is_empty(), "in a cycle:\n{}", wrong.join("\n"));
}

#[test]
fn an_upward_use_is_noticed() {
    let module = |path: &str| path.split("::").map(str::to_owned).collect::<Vec<_>>();
    let text = "use crate::{commands, report::json::{self, line}};\nuse crate::text::counted;\nlet a = super::engine::run();\n// crate::cli\n";
    let found = uses(&module("injector::plan"), false, text);
    for path in [
        "commands",
        "report::json",
        "report::json::line",
        "injector::engine::run",
    ] {
        assert!(found.contains(&module(path)), "{path}: {found:?}");
    }
    assert!(!found.contains(&module("cli")));
}
