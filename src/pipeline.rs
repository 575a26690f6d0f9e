//! The pipeline: find, diagnose and plan as one call, inject and verify as another, without a terminal, a clock or a
//! global in them.

use std::collections::HashMap;
use std::io;
use std::iter::zip;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;

use anyhow::{Context, anyhow};
use rayon::slice::ParallelSliceMut;

use crate::config::{Action, Config, Format};
use crate::diagnosis::Cause;
use crate::finder::listeners::Listeners;
use crate::finder::netns::{Namespaces, Netns, Which};
use crate::finder::owners::{Holding, Proc};
use crate::finder::sock_diag::SockDiag;
use crate::finder::{self, FindError, Found};
use crate::injector;
use crate::injector::ladder::{self, Outcome, Surroundings, Verdict};
use crate::plan::{self, Plan};
use crate::privileges::Privileges;
use crate::reclaim::{self, Fate, Reason, Visit, Wanted};
use crate::refill::Refill;
use crate::selectors::Selectors;
use crate::sweep::{self, Swept};
use crate::threads;

/// Sockets of one namespace that are worth a second crew.
const CREW: usize = 2048;
/// Crews at work at the same time: enough to wait for many namespaces together.
const CREWS_AT_ONCE: usize = 16;

/// What was found, planned and done: all that a report needs.
#[derive(Debug)]
pub struct Run {
    /// The network namespaces that were looked into; [`finder::Socket::netns`] counts them.
    pub namespaces: Vec<Netns>,
    /// What matched.
    pub found: Found,
    /// What was planned for each socket of `found`.
    pub plans: Vec<Plan>,
    /// Why it is not known what matched besides those that were destroyed while they were listed.
    pub unlisted: Option<String>,
    /// What was destroyed before; none once the work is done, for then it is in the other lists.
    pub swept: Swept,
    /// What became of each; `None` when nothing was to be done.
    pub deeds: Option<Vec<Deed>>,
    /// What came after; `None` if it was not watched.
    pub refill: Option<Refill>,
    /// What became of their descriptors, or would; `None` without `--reclaim`.
    pub reclaimed: Option<Reclaimed>,
}

impl Run {
    fn new(namespaces: Namespaces, found: Found, plans: Vec<Plan>) -> Self {
        Run {
            namespaces: namespaces.open,
            found,
            plans,
            unlisted: None,
            swept: Swept::default(),
            deeds: None,
            reclaimed: None,
            refill: None,
        }
    }

    /// Adds what was swept to what was found, planned and done `later`; all outcomes, in order if somebody will read them.
    pub(crate) fn take_in_swept(&mut self, later: Vec<Outcome>, read: bool) -> Vec<Outcome> {
        let Swept {
            mut sockets,
            mut plans,
            mut outcomes,
        } = mem::take(&mut self.swept);
        if sockets.is_empty() {
            return later;
        }
        sockets.append(&mut self.found.sockets);
        plans.append(&mut self.plans);
        outcomes.extend(later);
        if read {
            let mut rows: Vec<_> = zip(sockets, zip(plans, outcomes)).collect();
            rows.par_sort_by_key(|(socket, _)| socket.oldest_first());
            let rest: Vec<_>;
            (sockets, rest) = rows.into_iter().unzip();
            (plans, outcomes) = rest.into_iter().unzip();
        }
        (self.found.sockets, self.plans) = (sockets, plans);
        outcomes
    }
}

/// What `--reclaim` did. The lists are as long as `found.sockets`, those in them as the owners of each.
#[derive(Debug)]
pub struct Reclaimed {
    /// What became of each descriptor; `None` if its socket is not closed, so that it was not asked about.
    pub fates: Vec<Vec<Option<Fate>>>,
    /// When nothing was to be done: what speaks against taking each.
    pub doubts: Vec<Vec<Option<Reason>>>,
    /// The processes that were stopped; their owners are indices of `found.processes`.
    pub visits: Vec<Visit>,
}

/// What became of one socket.
#[derive(Debug)]
pub struct Deed {
    /// The outcome.
    pub outcome: Outcome,
    /// Of a socket that is closed or about to be: whether each of [`finder::Socket::owners`] still has
    /// its descriptor. Only closing it frees it. `None` where the owners are not known.
    pub descriptors: Option<Vec<Holding>>,
}

/// Finds the sockets and plans what to do with each, as far as `privileges` allow; does nothing to any.
///
/// # Errors
/// Nothing can be found at all.
pub fn plan(config: &Config, proc: &Proc, privileges: &Privileges) -> anyhow::Result<Run> {
    plan_in(open(&config.netns, proc)?, config, proc, privileges)
}

fn plan_in(
    namespaces: Namespaces,
    config: &Config,
    proc: &Proc,
    privileges: &Privileges,
) -> anyhow::Result<Run> {
    let found = find(&namespaces, proc, &config.selectors, config.owners)?;
    let plans = plan::build(&found, &config.policy, privileges);
    Ok(Run::new(namespaces, found, plans))
}

/// As [`plan()`], but where `config` [fits](sweep::fits) most of what matches is destroyed before it returns.
///
/// # Errors
/// As [`plan()`], if nothing was done.
pub fn sweep_and_plan(
    config: &Config,
    proc: &Proc,
    privileges: &Privileges,
    surroundings: &dyn Surroundings,
) -> anyhow::Result<Run> {
    let namespaces = open(&config.netns, proc)?;
    let mut swept = match &namespaces.open[..] {
        [netns] if sweep::fits(config) => sweep::sweep(config, netns, privileges, surroundings),
        _ => return plan_in(namespaces, config, proc, privileges),
    };
    // Few are left; if there were few to begin with, one look is enough for them as well.
    let rest = || -> anyhow::Result<_> {
        let found = finder::find_sockets(&namespaces.open, &config.selectors, false)?;
        let found = with_unseen(found, &namespaces);
        let plans = plan::build(&found, &config.policy, privileges);
        Ok((found, plans))
    };
    let rest = match catch_unwind(AssertUnwindSafe(rest)) {
        Err(panic) if swept.sockets.is_empty() => resume_unwind(panic),
        Err(_) => Err(anyhow!("a bug of cwkill")),
        Ok(rest) => rest,
    };
    let (found, plans, unlisted) = match rest {
        Ok((found, plans)) => (found, plans, None),
        Err(error) if swept.sockets.is_empty() => return Err(error),
        // What was done has to be told.
        Err(error) => {
            let found = with_unseen(Found::default(), &namespaces);
            (found, Vec::new(), Some(format!("{error:#}")))
        }
    };
    // One that withstood the sweep is tried again.
    swept.leave_out(&found.sockets);
    let mut run = Run::new(namespaces, found, plans);
    (run.swept, run.unlisted) = (swept, unlisted);
    Ok(run)
}

/// Does what `run` plans, if `config` wants it done. What happens to a single socket is in its outcome.
pub fn carry_out(
    run: &mut Run,
    config: &Config,
    proc: &Proc,
    privileges: &Privileges,
    surroundings: &dyn Surroundings,
) {
    let mut before = Vec::new();
    if config.action == Action::Act {
        surroundings.begin();
        if let Some(rules) = &config.reclaim {
            let (_, wanted) = wanted(&run.found, &|_| true);
            before = reclaim::in_calls(&run.found.processes, &wanted, rules, proc);
        }
        let outcomes = act(run, config, proc, privileges, surroundings);
        let outcomes = run.take_in_swept(outcomes, config.format != Format::Quiet);
        run.deeds = Some(account(&run.found, outcomes, proc));
    }
    if let Some(rules) = &config.reclaim {
        run.reclaimed = Some(reclaim(run, before, rules, proc, surroundings));
    }
}

/// Opens the namespaces that are meant.
///
/// # Errors
/// As [`Which::open`].
pub fn open(which: &Which, proc: &Proc) -> anyhow::Result<Namespaces> {
    which.open(proc).with_context(|| match which {
        Which::One(text) => format!("cannot open the network namespace {text}"),
        Which::Ours | Which::All => "cannot tell the network namespaces".into(),
    })
}

/// Finds what matches in them, with or without looking for `owners`, and says what could not be seen.
///
/// # Errors
/// As [`finder::find`].
pub fn find(
    namespaces: &Namespaces,
    proc: &Proc,
    selectors: &Selectors,
    owners: bool,
) -> Result<Found, FindError> {
    let found = match owners {
        true => finder::find(&namespaces.open, proc, selectors)?,
        false => finder::find_sockets(&namespaces.open, selectors, true)?,
    };
    Ok(with_unseen(found, namespaces))
}

/// Adds the namespaces that could not be opened.
fn with_unseen(mut found: Found, namespaces: &Namespaces) -> Found {
    found.unreachable_namespaces += namespaces.unreachable;
    found.untold_namespaces = namespaces.untold;
    let unopened = namespaces.failure.as_ref();
    let unopened = unopened.map(|error| format!("opening it: {error}"));
    found.namespace_failure = found.namespace_failure.or(unopened);
    found
}

/// The descriptors of those of the sockets that are `meant`, and where each is: its socket, and its owner among those of the socket.
fn wanted(found: &Found, meant: &dyn Fn(usize) -> bool) -> (Vec<(usize, usize)>, Vec<Wanted>) {
    let mut places = Vec::new();
    let mut wanted = Vec::new();
    for (at, socket) in found.sockets.iter().enumerate() {
        let Some(inode) = socket.inode.filter(|_| meant(at)) else {
            continue;
        };
        for (owner, held) in socket.owners.iter().enumerate() {
            places.push((at, owner));
            wanted.push(Wanted {
                owner: held.process,
                fd: held.fd,
                inode,
                cookie: socket.cookie(),
                age: socket.age,
                unread: 0,
                agreed: socket.recv_q,
            });
        }
    }
    (places, wanted)
}

/// Closes the descriptors of what was closed, or says what would speak against it. `before` is what became of some, each in its
/// place among those of all sockets, before those were closed.
fn reclaim(
    run: &mut Run,
    before: Vec<Option<Fate>>,
    rules: &reclaim::Rules,
    proc: &Proc,
    surroundings: &dyn Surroundings,
) -> Reclaimed {
    let found = &run.found;
    fn empty<T>(found: &Found) -> Vec<Vec<Option<T>>> {
        let none = |socket: &finder::Socket| socket.owners.iter().map(|_| None).collect();
        found.sockets.iter().map(none).collect()
    }
    let mut reclaimed = Reclaimed {
        fates: empty(found),
        doubts: empty(found),
        visits: Vec::new(),
    };
    let Some(deeds) = &mut run.deeds else {
        let (places, wanted) = wanted(found, &|_| true);
        let doubts = reclaim::judge(&found.processes, &wanted, rules, proc);
        for ((at, owner), doubt) in places.into_iter().zip(doubts) {
            reclaimed.doubts[at][owner] = doubt;
        }
        return reclaimed;
    };
    let closed = |at: usize| matches!(deeds[at].outcome.verdict, Verdict::Closed(_));
    let (places, all) = wanted(found, &|_| true);
    let mut ended = vec![Vec::new(); found.processes.len()];
    for (((at, owner), wanted), fate) in zip(zip(places, all), before) {
        if let Some(fate) = fate.filter(|_| closed(at)) {
            ended[wanted.owner].push((wanted.fd, wanted.inode, (at, owner)));
            reclaimed.fates[at][owner] = Some(fate);
        }
    }
    let (places, wanted) = wanted(found, &closed);
    if !wanted.is_empty() {
        reclaim::let_owners_react(rules, surroundings);
    }
    let open = |(at, owner): (usize, usize)| reclaimed.fates[at][owner].is_none();
    let (places, wanted): (Vec<_>, Vec<_>) = zip(places, wanted)
        .filter(|(place, _)| open(*place))
        .unzip();
    for ((at, owner), holding) in proc.still_held(&found.processes, &ended) {
        if let (Holding::Closed, Some(descriptors)) = (holding, &mut deeds[at].descriptors) {
            descriptors[owner] = holding;
            reclaimed.fates[at][owner] = Some(Fate::Gone);
        }
    }
    let interrupted = || surroundings.interrupted();
    let done = reclaim::reclaim(&found.processes, &wanted, rules, proc, &interrupted);
    reclaimed.visits = done.visits;
    for ((at, owner), fate) in places.into_iter().zip(done.fates) {
        if let (Fate::Freed | Fate::Gone, Some(descriptors)) = (&fate, &mut deeds[at].descriptors) {
            descriptors[owner] = Holding::Closed;
        }
        reclaimed.fates[at][owner] = Some(fate);
    }
    reclaimed
}

/// What a crew brings back.
struct Report {
    outcomes: Vec<Outcome>,
    /// Connections that wait at listening sockets, by inode, if any was closed before it was accepted.
    waiting: HashMap<u32, u32>,
}

/// Closes what is planned, the namespaces and the parts of a large one side by side.
fn act(
    run: &mut Run,
    config: &Config,
    proc: &Proc,
    privileges: &Privileges,
    surroundings: &dyn Surroundings,
) -> Vec<Outcome> {
    let rules = config.rules(privileges);
    let crews = crews(&run.found);
    let work = |members: &[usize]| {
        let netns = &run.namespaces[run.found.sockets[members[0]].netns];
        let names = &config.policy.methods;
        let begin = || -> io::Result<Report> {
            let mut diag = SockDiag::open()?;
            let mut methods = injector::methods(names, proc)?;
            let (found, plans) = (&run.found, &run.plans);
            let outcomes = ladder::climb(
                found,
                plans,
                members,
                &mut methods,
                &mut diag,
                rules,
                surroundings,
            );
            let waiting = waiting(found, members, &outcomes, &mut diag);
            Ok(Report { outcomes, waiting })
        };
        netns
            .within(begin)
            .and_then(|report| report)
            .unwrap_or_else(|error| unknown(&run.plans, members, "preparing", error.raw_os_error()))
    };
    let reports = threads::side_by_side(&crews, CREWS_AT_ONCE, |crew| work(crew));
    // What the other crews did is reported even if one has run into a bug of ours.
    let report = |(crew, report): (&Vec<usize>, thread::Result<Report>)| {
        report.unwrap_or_else(|_| unknown(&run.plans, crew, Outcome::BUG, None))
    };
    let reports: Vec<Report> = crews.iter().zip(reports).map(report).collect();

    let mut outcomes: Vec<Option<Outcome>> = run.plans.iter().map(|_| None).collect();
    for (crew, report) in crews.iter().zip(reports) {
        for (&at, outcome) in crew.iter().zip(report.outcomes) {
            outcomes[at] = Some(outcome);
        }
        for listener in &mut run.found.listeners {
            if listener
                .inodes
                .iter()
                .any(|inode| report.waiting.contains_key(inode))
            {
                let waiting = listener
                    .inodes
                    .iter()
                    .filter_map(|inode| report.waiting.get(inode));
                listener.waiting = waiting.sum();
            }
        }
    }
    outcomes.into_iter().flatten().collect()
}

/// The sockets that are worked on together: those of one namespace, and of a large one a share each
/// for every processor.
fn crews(found: &Found) -> Vec<Vec<usize>> {
    let mut by_netns: HashMap<usize, Vec<usize>> = HashMap::new();
    for (at, socket) in found.sockets.iter().enumerate() {
        by_netns.entry(socket.netns).or_default().push(at);
    }
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let share = |members: Vec<usize>| -> Vec<Vec<usize>> {
        let size = members.len().div_ceil(processors).max(CREW);
        members.chunks(size).map(<[usize]>::to_vec).collect()
    };
    by_netns.into_values().flat_map(share).collect()
}

/// What a crew that could not work, or not to its end, brings back.
fn unknown(plans: &[Plan], members: &[usize], step: &'static str, errno: Option<i32>) -> Report {
    let outcome = |&at: &usize| Outcome::unknown(&plans[at], step, errno);
    Report {
        outcomes: members.iter().map(outcome).collect(),
        waiting: HashMap::new(),
    }
}

/// The state of the backlogs after connections in them were closed.
fn waiting(
    found: &Found,
    members: &[usize],
    outcomes: &[Outcome],
    diag: &mut SockDiag,
) -> HashMap<u32, u32> {
    let closed = |outcome: &Outcome| matches!(outcome.verdict, Verdict::Closed(_));
    let mut both = members.iter().zip(outcomes);
    let any =
        both.any(|(&at, outcome)| found.sockets[at].cause == Cause::NotAccepted && closed(outcome));
    match any {
        true => Listeners::read(diag).map_or_else(|_| HashMap::new(), |l| l.waiting_by_inode()),
        false => HashMap::new(),
    }
}

/// Adds to every outcome which descriptors of the dead socket are still open.
fn account(found: &Found, outcomes: Vec<Outcome>, proc: &Proc) -> Vec<Deed> {
    let mut asked = vec![Vec::new(); found.processes.len()];
    let mut deeds = Vec::with_capacity(outcomes.len());
    for (at, outcome) in outcomes.into_iter().enumerate() {
        let socket = &found.sockets[at];
        let over = matches!(outcome.verdict, Verdict::Closed(_) | Verdict::Closing(..));
        let descriptors = match socket.inode {
            // No descriptor was ever made, or none is left.
            None if over => Some(Vec::new()),
            Some(inode) if over && !socket.owners.is_empty() => {
                for (owner, held) in socket.owners.iter().enumerate() {
                    asked[held.process].push((held.fd, inode, (at, owner)));
                }
                Some(vec![Holding::Unknown; socket.owners.len()])
            }
            _ => None,
        };
        deeds.push(Deed {
            outcome,
            descriptors,
        });
    }
    for ((at, owner), holding) in proc.still_held(&found.processes, &asked) {
        if let Some(descriptors) = &mut deeds[at].descriptors {
            descriptors[owner] = holding;
        }
    }
    deeds
}
