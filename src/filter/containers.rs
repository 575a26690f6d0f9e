//! The selectors of containers: by name or id, by pod, by kubernetes namespace, by compose service.

use std::collections::{BTreeMap, BTreeSet};

use globset::{Glob, GlobMatcher};

use crate::proc::cgroup::{Container, MIN_ID_PREFIX};
use crate::proc::{AbsentOwner, OwnerKind, Process};

/// A container matches if it matches one of the values of each selector that has any.
#[derive(Clone, Debug, Default)]
pub struct ContainerSelectors {
    pub containers: Vec<ContainerName>,
    pub pods: Vec<PodName>,
    pub namespaces: Vec<NamePattern>,
    pub compose_services: Vec<NamePattern>,
}

/// A name or a pattern.
#[derive(Clone, Debug)]
pub struct NamePattern {
    text: String,
    pattern: GlobMatcher,
}

/// The value of `--container`: a pattern for the name or the id, or the first digits of the id.
#[derive(Clone, Debug)]
pub struct ContainerName(NamePattern);

/// The value of `--pod`: `NAME` or `NAMESPACE/NAME`, both with patterns.
#[derive(Clone, Debug)]
pub struct PodName {
    text: String,
    namespace: Option<NamePattern>,
    name: NamePattern,
}

/// Whether a container is selected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Match {
    No,
    /// What decides could not be read.
    Unknown,
    Yes,
}

impl NamePattern {
    /// # Errors
    /// `text` is not a valid pattern.
    pub fn new(text: &str) -> Result<Self, globset::Error> {
        Ok(NamePattern {
            text: text.to_owned(),
            pattern: Glob::new(text)?.compile_matcher(),
        })
    }

    fn matches(&self, name: &str) -> bool {
        name == self.text || self.pattern.is_match(name)
    }

    /// Whether it is a plain name.
    fn means_one(&self) -> bool {
        !self.text.contains(['*', '?', '[', '{', '\\'])
    }

    /// The answer for a fact, which may be `unknown`.
    fn of(&self, fact: Option<&str>, unknown: bool) -> Match {
        match fact {
            Some(name) if self.matches(name) => Match::Yes,
            None if unknown => Match::Unknown,
            _ => Match::No,
        }
    }
}

impl ContainerName {
    /// # Errors
    /// `text` is not a valid pattern.
    pub fn new(text: &str) -> Result<Self, globset::Error> {
        NamePattern::new(text).map(ContainerName)
    }

    fn of(&self, container: &Container) -> Match {
        let by_pattern = || {
            let id = container.id.as_deref();
            self.has_start_of_an_id() && id.is_some_and(|id| self.0.matches(id))
        };
        if container.has_id(&self.0.text) || by_pattern() {
            return Match::Yes;
        }
        let may_be_called_so = container.may_have_a_name() && !self.is_like_an_id();
        self.0.of(container.name.as_deref(), may_be_called_so)
    }

    /// Whether a pattern begins with enough of an id. `db*` and `*a` are patterns for names, and some id always fits.
    fn has_start_of_an_id(&self) -> bool {
        let digits = self.0.text.bytes().take_while(u8::is_ascii_hexdigit);
        digits.count() >= MIN_ID_PREFIX
    }

    /// Whether the operator means an id. A container can have such a name, but hardly one that cannot be read.
    fn is_like_an_id(&self) -> bool {
        let text = &self.0.text;
        text.len() >= MIN_ID_PREFIX && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    }
}

impl PodName {
    /// # Errors
    /// A part of `text` is not a valid pattern.
    pub fn new(text: &str) -> Result<Self, globset::Error> {
        let (namespace, name) = match text.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, text),
        };
        Ok(PodName {
            text: text.to_owned(),
            namespace: namespace.map(NamePattern::new).transpose()?,
            name: NamePattern::new(name)?,
        })
    }

    fn of(&self, container: &Container) -> Match {
        let unknown = container.may_be_in_a_pod();
        let name = self.name.of(container.facts.pod.as_deref(), unknown);
        let namespace = self.namespace.as_ref();
        let namespace = namespace.map_or(Match::Yes, |name| of_namespace(name, container));
        name.min(namespace)
    }
}

impl ContainerSelectors {
    /// Whether they select everything.
    pub fn is_empty(&self) -> bool {
        self.containers.is_empty()
            && self.pods.is_empty()
            && self.namespaces.is_empty()
            && self.compose_services.is_empty()
    }

    /// Whether a process in `container` is selected; `None`: it is in none.
    pub fn of(&self, container: Option<&Container>) -> Match {
        if self.is_empty() {
            return Match::Yes;
        }
        let Some(container) = container else {
            return Match::No;
        };
        let best = |answers: &mut dyn Iterator<Item = Match>| answers.max().unwrap_or(Match::Yes);
        [
            best(&mut self.containers.iter().map(|name| name.of(container))),
            best(&mut self.pods.iter().map(|name| name.of(container))),
            best(
                &mut self
                    .namespaces
                    .iter()
                    .map(|name| of_namespace(name, container)),
            ),
            best(
                &mut self
                    .compose_services
                    .iter()
                    .map(|name| of_service(name, container)),
            ),
        ]
        .into_iter()
        .min()
        .unwrap_or(Match::Yes)
    }

    /// The values that none of `processes` has or may have.
    pub fn absent(&self, processes: &[Process]) -> Vec<AbsentOwner> {
        let mut absent = Vec::new();
        let mut add = |kind, text: &str, of: &dyn Fn(&Container) -> Match| {
            let mut containers = processes
                .iter()
                .filter_map(|one| one.cgroup.container.as_ref());
            if containers.all(|container| of(container) == Match::No) {
                absent.push(AbsentOwner::new(kind, text));
            }
        };
        for name in &self.containers {
            add(OwnerKind::Container, &name.0.text, &|one| name.of(one));
        }
        for name in &self.pods {
            add(OwnerKind::Pod, &name.text, &|one| name.of(one));
        }
        for name in &self.namespaces {
            add(OwnerKind::Namespace, &name.text, &|one| {
                of_namespace(name, one)
            });
        }
        for name in &self.compose_services {
            add(OwnerKind::ComposeService, &name.text, &|one| {
                of_service(name, one)
            });
        }
        absent
    }

    /// Notes on plain names that several containers or pods have. `selected`: the processes that all selectors select.
    pub fn names_of_several(&self, selected: &[&Process]) -> Vec<String> {
        const MAX_NAMED: usize = 3;
        let mut notes = Vec::new();
        let mut note = |option: &str, text: &str, common: &str, found: Vec<String>| {
            if found.len() > 1 {
                let named = &found[..found.len().min(MAX_NAMED)];
                let more = found.len() - named.len();
                let more = if more > 0 {
                    format!(" and {more} more")
                } else {
                    String::new()
                };
                notes.push(format!(
                    "{option} {}: {} have {common}, and all are selected: {}{more}",
                    crate::text::escape(text),
                    crate::text::counted(found.len(), option.trim_start_matches('-')),
                    named.join(", ")
                ));
            }
        };
        let containers = || {
            selected
                .iter()
                .filter_map(|one| one.cgroup.container.as_ref())
        };
        for name in self.containers.iter().filter(|name| name.0.means_one()) {
            let matching = containers().filter(|one| name.of(one) == Match::Yes);
            let found: BTreeMap<_, _> = matching.map(|one| (one.key(), one.with_id())).collect();
            // Runtimes choose ids at random, each for itself.
            let by_id = containers().any(|one| one.has_id(&name.0.text));
            let common = match by_id {
                true => "an id that begins like this",
                false => "this name",
            };
            let found = found.values().map(|text| crate::text::escape(text));
            note("--container", &name.0.text, common, found.collect());
        }
        for pod in self.pods.iter().filter(|pod| pod.name.means_one()) {
            let matching = containers().filter(|one| pod.of(one) == Match::Yes);
            let name = |one: &Container| {
                let namespace = one.facts.namespace.as_deref().unwrap_or("?");
                let pod = one.facts.pod.as_deref().unwrap_or("?");
                crate::text::escape(&format!("{namespace}/{pod}"))
            };
            let found: BTreeSet<String> = matching.map(name).collect();
            note("--pod", &pod.text, "this name", found.into_iter().collect());
        }
        notes
    }
}

fn of_namespace(name: &NamePattern, container: &Container) -> Match {
    let unknown = container.may_be_in_a_pod() && container.runtime.may_be_of_kubernetes();
    name.of(container.facts.namespace.as_deref(), unknown)
}

fn of_service(name: &NamePattern, container: &Container) -> Match {
    let fact = container.facts.compose_service.as_deref();
    name.of(fact, container.may_be_of_a_service())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::cgroup::{Cgroup, Facts};
    use crate::proc::testdata::process;

    const ID: &str = "3f4a9b2c1d0e5f6a7b8c9d0e1f2a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c";

    fn of_path(path: &str) -> Container {
        let cgroup = Cgroup::parse(&format!("0::{path}\n"));
        cgroup.container.expect("a container")
    }

    fn docker() -> Container {
        of_path(&format!("/docker/{ID}"))
    }

    fn named(name: &str) -> Container {
        Container {
            name: Some(name.into()),
            facts: Facts {
                was_read: true,
                ..Facts::default()
            },
            ..docker()
        }
    }

    fn in_pod(namespace: &str, pod: &str, name: &str) -> Container {
        let mut container = named(name);
        container.facts.pod = Some(pod.into());
        container.facts.namespace = Some(namespace.into());
        container
    }

    fn selectors(option: &str, text: &str) -> ContainerSelectors {
        let mut selectors = ContainerSelectors::default();
        match option {
            "container" => selectors.containers.push(ContainerName::new(text).unwrap()),
            "pod" => selectors.pods.push(PodName::new(text).unwrap()),
            "namespace" => selectors.namespaces.push(NamePattern::new(text).unwrap()),
            _ => selectors
                .compose_services
                .push(NamePattern::new(text).unwrap()),
        }
        selectors
    }

    #[test]
    fn a_name_that_could_not_be_read_may_match() {
        use Match::{No, Unknown, Yes};
        let of = |option: &str, text: &str, container: &Container| {
            selectors(option, text).of(Some(container))
        };
        for (text, unread, read) in [
            ("web", Unknown, Yes),
            ("we*", Unknown, Yes),
            ("other", Unknown, No),
            (ID, Yes, Yes),
            (&ID[..8], Yes, Yes),
            ("3f4a*", Unknown, No),
            ("*a", Unknown, No),
            // Too short for an id, and no name.
            (&ID[..7], Unknown, No),
            // Nobody means a name with that.
            ("c0ffee00c0ff", No, No),
        ] {
            assert_eq!(of("container", text, &docker()), unread, "{text}");
            assert_eq!(of("container", text, &named("web")), read, "{text}");
        }
        let pod = in_pod("shop", "web-5c9", "php");
        for (option, text, answer) in [
            ("container", "php", Yes),
            ("pod", "web-5c9", Yes),
            ("pod", "web-*", Yes),
            ("pod", "shop/web-*", Yes),
            ("pod", "sh*/web-5c9", Yes),
            ("pod", "bank/web-*", No),
            ("pod", "php", No),
            ("namespace", "shop", Yes),
            ("namespace", "bank", No),
            ("compose-service", "web", No),
        ] {
            assert_eq!(of(option, text, &pod), answer, "--{option} {text}");
        }
        for option in ["pod", "namespace", "compose-service"] {
            assert_eq!(
                of(option, "x", &named("web")),
                No,
                "{option}: it is in none"
            );
            assert_eq!(of(option, "x", &docker()), Unknown, "{option}");
            let lxc = of_path("/lxc.payload.web");
            assert_eq!(of(option, "x", &lxc), No, "{option}: LXC has none");
            assert_eq!(selectors(option, "x").of(None), No, "{option}");
        }
        assert_eq!(of("container", "web", &of_path("/lxc.payload.web")), Yes);
        assert_eq!(of("container", "wep", &of_path("/lxc.payload.web")), No);
        let podman = of_path(&format!("/machine.slice/libpod-{ID}.scope"));
        assert_eq!(of("namespace", "shop", &podman), No, "not of kubernetes");
        assert_eq!(of("compose-service", "web", &podman), Unknown);
        assert_eq!(of("pod", "web", &podman), No, "its cgroup is in no pod");
        let pod = format!("libpod_pod_{}", "c0ffee00".repeat(8));
        for (path, in_a_pod) in [
            (
                format!("/machine.slice/machine-{pod}.slice/libpod-{ID}.scope"),
                Unknown,
            ),
            (format!("/libpod_parent/{ID}/libpod-{ID}"), Unknown),
            (
                format!("/system.slice/web.service/libpod-payload-{ID}"),
                Unknown,
            ),
            (format!("/libpod_parent/libpod-{ID}"), No),
        ] {
            let podman = of_path(&path);
            assert_eq!(of("pod", "web", &podman), in_a_pod, "{path}");
            assert_eq!(
                of("pod", "shop/web", &podman),
                No,
                "{path}: in no namespace"
            );
        }
        assert!(
            podman
                .why_unnamed()
                .contains("podman keeps pods and labels")
        );
        assert_eq!(ContainerSelectors::default().of(None), Yes);
    }

    #[test]
    fn every_selector_counts() {
        let mut both = selectors("container", "php");
        both.pods = selectors("pod", "web").pods;
        assert_eq!(both.of(Some(&in_pod("shop", "web", "php"))), Match::Yes);
        assert_eq!(both.of(Some(&in_pod("shop", "web", "nginx"))), Match::No);
        assert_eq!(both.of(Some(&in_pod("shop", "api", "php"))), Match::No);
        assert_eq!(both.of(Some(&docker())), Match::Unknown);
        assert_eq!(both.of(Some(&named("nginx"))), Match::No);
    }

    fn processes(containers: Vec<Container>) -> Vec<Process> {
        let one = |(pid, container)| {
            let mut process = Process::clone(&process(pid, "php"));
            process.cgroup.container = Some(container);
            process
        };
        (1..).zip(containers).map(one).collect()
    }

    #[test]
    fn absent_is_what_no_container_may_be() {
        let absent = |container| {
            let found = selectors("container", "web").absent(&processes(vec![container]));
            !found.is_empty()
        };
        assert!(absent(named("api")) && !absent(named("web")) && !absent(docker()));
    }

    #[test]
    fn two_runtimes_can_have_ids_that_begin_alike() {
        let start = &ID[..12];
        let other = format!("{start}{}", "0".repeat(52));
        let podman = of_path(&format!("/machine.slice/libpod-{other}.scope"));
        let selectors = selectors("container", start);
        assert_eq!(selectors.of(Some(&docker())), Match::Yes);
        assert_eq!(selectors.of(Some(&podman)), Match::Yes);
        let all = processes(vec![docker(), podman]);
        let found: Vec<&Process> = all.iter().collect();
        assert_eq!(
            selectors.names_of_several(&found),
            [format!(
                "--container {start}: 2 containers have an id that begins like this, and all are selected: docker {start}, podman {start}"
            )]
        );
    }

    #[test]
    fn a_name_of_several_is_noted() {
        let other = "c0ffee00".repeat(8);
        let second = Container {
            id: Some(other),
            ..named("web")
        };
        let all = processes(vec![named("web"), named("web"), second, named("api")]);
        let found: Vec<&Process> = all.iter().collect();
        let notes = selectors("container", "web").names_of_several(&found);
        assert_eq!(
            notes,
            [
                "--container web: 2 containers have this name, and all are selected: docker 3f4a9b2c1d0e, docker c0ffee00c0ff"
            ]
        );
        assert!(
            selectors("container", "w*")
                .names_of_several(&found)
                .is_empty()
        );
        let both = &found[..2];
        let one = selectors("container", "web").names_of_several(both);
        assert!(one.is_empty(), "another selector has left one: {one:?}");
        let pods = processes(vec![in_pod("shop", "web", "a"), in_pod("bank", "web", "b")]);
        let pods: Vec<&Process> = pods.iter().collect();
        let notes = selectors("pod", "web").names_of_several(&pods);
        assert_eq!(
            notes,
            ["--pod web: 2 pods have this name, and all are selected: bank/web, shop/web"]
        );
        let notes = selectors("pod", "shop/web").names_of_several(&pods);
        assert!(notes.is_empty(), "{notes:?}");
    }
}
