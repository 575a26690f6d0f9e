//! The reasons that the sockets of a run share: why they were kept or are not closed. Each is said once, below the table.

use std::collections::BTreeMap;

use crate::model::{Exclusion, Method, Outcome, ReclaimReason, SkipReason, Target};
use crate::report::{Run, text};
use crate::text::counted;

/// With more texts than this, a reason is shown by an example.
const MAX_TEXTS: usize = 2;

/// The kind of a reason: what it explains, and its stable code.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reason {
    kind: Kind,
    code: String,
}

/// What a reason explains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kind {
    Failed,
    Kept,
    Closing,
    DescriptorKept,
}

/// The reasons for the result of a target, with their texts.
pub fn of_target(target: &Target) -> impl Iterator<Item = (Reason, String)> {
    let reason = |kind, code: &str, text| {
        let code = code.to_owned();
        (Reason { kind, code }, text)
    };
    let kept = |why: SkipReason| {
        let text = text::skip_reason(&target.plan, why);
        let excluded = target.plan.excluded.iter();
        let code = match why {
            // The reasons against its methods tell more.
            SkipReason::NoMethod => excluded
                .map(|(method, why): &(Method, Exclusion)| format!("{method} {}", why.code()))
                .collect::<Vec<_>>()
                .join(" "),
            _ => why.code().to_owned(),
        };
        reason(Kind::Kept, &code, text)
    };
    let of_socket = match (target.outcome, target.plan.skip) {
        (Some(Outcome::Skipped(why)), _) | (None, Some(why)) => Some(kept(why)),
        (Some(Outcome::Failed), _) => {
            let code = target.reason_code().unwrap_or_default();
            Some(reason(Kind::Failed, code, text::attempts(target)))
        }
        (Some(Outcome::Closing(method, state)), _) => {
            let text = format!("{state} after {method}, the peer has not answered");
            Some(reason(Kind::Closing, state.name(), text))
        }
        (Some(Outcome::Closed(_) | Outcome::Gone) | None, _) => None,
    };
    let outcomes = target
        .owners
        .iter()
        .filter_map(|owner| owner.reclaim.as_ref());
    let of_descriptors = outcomes.filter_map(move |outcome| {
        let why: &ReclaimReason = outcome.reason()?;
        Some(reason(Kind::DescriptorKept, why.code(), why.to_string()))
    });
    of_socket.into_iter().chain(of_descriptors)
}

/// The reasons of a run, the most frequent first, each with its line.
pub fn lines(run: &Run) -> Vec<(Reason, String)> {
    let mut reasons: BTreeMap<Reason, BTreeMap<String, usize>> = BTreeMap::new();
    for (reason, text) in run.scan.targets.iter().flat_map(of_target) {
        *reasons.entry(reason).or_default().entry(text).or_default() += 1;
    }
    let mut counted: Vec<(usize, Reason, String)> = reasons
        .into_iter()
        .map(|(reason, texts)| {
            let count = texts.values().sum();
            let line = line(reason.kind, &texts);
            (count, reason, line)
        })
        .collect();
    // The order of equal counts is that of the map.
    counted.sort_by_key(|(count, ..)| std::cmp::Reverse(*count));
    let pair = |(_, reason, line)| (reason, line);
    counted.into_iter().map(pair).collect()
}

fn line(kind: Kind, texts: &BTreeMap<String, usize>) -> String {
    let words = |count: usize| match kind {
        Kind::Failed => format!("{count} failed"),
        Kind::Kept => format!("{count} kept"),
        Kind::Closing => format!("{count} closing"),
        Kind::DescriptorKept => format!("{} kept", counted(count, "descriptor")),
    };
    with_words(words, texts)
}

/// One line about the `texts` of a reason, each with the number of those that it explains: `words` say what these are.
pub fn with_words(words: impl Fn(usize) -> String, texts: &BTreeMap<String, usize>) -> String {
    if texts.len() <= MAX_TEXTS {
        let parts = texts
            .iter()
            .map(|(text, count)| format!("{}: {text}", words(*count)));
        return parts.collect::<Vec<_>>().join("; ");
    }
    let most = texts.iter().max_by_key(|(_, count)| **count);
    let (example, _) = most.expect("several");
    format!("{}, for example: {example}", words(texts.values().sum()))
}

/// A letter for each reason, that stands in the rows.
pub fn label(index: usize) -> String {
    const LETTERS: usize = 26;
    let letter = |index: usize| {
        let place = u8::try_from(index % LETTERS).unwrap_or(0);
        char::from(b'a' + place)
    };
    match index / LETTERS {
        0 => letter(index).to_string(),
        more => label(more - 1) + &letter(index).to_string(),
    }
}

/// How sockets were closed, or in a dry run would be; the most frequent way first. `None` if none was.
pub fn ways(run: &Run) -> Option<String> {
    let mut ways: BTreeMap<String, usize> = BTreeMap::new();
    for target in &run.scan.targets {
        let way = match (target.outcome, target.plan.skip) {
            (Some(Outcome::Closed(method)), _) => method.to_string(),
            (None, None) if !run.acted => {
                let then = match run.reclaim_requested && !target.owners.is_empty() {
                    true => ", then reclaim",
                    false => "",
                };
                text::plan_text(&target.plan) + then
            }
            _ => continue,
        };
        *ways.entry(way).or_default() += 1;
    }
    let mut ways: Vec<(String, usize)> = ways.into_iter().collect();
    ways.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let verb = match run.acted {
        true => "closed",
        false => "to close",
    };
    let parts: Vec<String> = ways
        .iter()
        .map(|(way, count)| format!("{count} {verb} by {way}"))
        .collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_letters() {
        let labels: Vec<String> = [0, 1, 25, 26, 27, 52].map(label).into();
        assert_eq!(labels, ["a", "b", "z", "aa", "ab", "ba"]);
    }

    #[test]
    fn a_reason_with_many_texts_has_an_example() {
        let texts = |texts: &[(&str, usize)]| {
            let texts = texts
                .iter()
                .map(|(text, count)| ((*text).to_owned(), *count));
            line(Kind::Kept, &texts.collect())
        };
        assert_eq!(texts(&[("peer is alive", 3)]), "3 kept: peer is alive");
        assert_eq!(texts(&[("x 1", 1), ("x 2", 2)]), "1 kept: x 1; 2 kept: x 2");
        assert_eq!(
            texts(&[("x 1", 1), ("x 2", 2), ("x 3", 1)]),
            "4 kept, for example: x 2"
        );
    }
}
