//! Bytecode against the predicate: a small interpreter that follows the kernel's, and its audit.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::{Ipv4Net, Ipv6Net};
use proptest::prelude::*;

use super::*;
use crate::filter::selectors::{IpVersion, Selectors};
use crate::filter::{Services, SocketFacts, parse};
use crate::model::Socket;
use crate::sock_diag::testdata::stuck;
use crate::sock_diag::{Cookie, DiagId};
use crate::tcp::{TcpState, Tuple};

/// `struct inet_diag_entry`, addresses as the kernel has them.
struct Entry {
    family: u8,
    local: Vec<u8>,
    peer: Vec<u8>,
    local_port: u16,
    peer_port: u16,
    interface: u32,
    cgroup: u64,
    autobound: bool,
}

const EPHEMERAL: RangeInclusive<u16> = 32_768..=60_999;

impl From<&SocketFacts> for Entry {
    fn from(facts: &SocketFacts) -> Self {
        let address = |address: IpAddr| match (facts.family, address) {
            (Family::V4, IpAddr::V4(v4)) => v4.octets().to_vec(),
            (Family::V6, IpAddr::V4(v4)) => v4.to_ipv6_mapped().octets().to_vec(),
            (_, IpAddr::V6(v6)) => v6.octets().to_vec(),
        };
        Entry {
            family: facts.family.number(),
            local: address(facts.tuple.local.ip()),
            peer: address(facts.tuple.peer.ip()),
            local_port: facts.tuple.local.port(),
            peer_port: facts.tuple.peer.port(),
            interface: facts.interface,
            cgroup: facts.cgroup.unwrap_or(0),
            // Here the kernel's answer and that of the range agree.
            autobound: EPHEMERAL.contains(&facts.tuple.local.port()),
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_ne_bytes([bytes[at], bytes[at + 1]]))
}

/// bitstring_match.
fn same_bits(a: &[u8], b: &[u8], bits: u8) -> bool {
    (0..usize::from(bits)).all(|bit| {
        let mask = 0x80 >> (bit % 8);
        a[bit / 8] & mask == b[bit / 8] & mask
    })
}

/// inet_diag_bc_run.
fn run(bytecode: &[u8], entry: &Entry) -> bool {
    let mut rest = bytecode;
    loop {
        let [code, yes, ..] = *rest else {
            return true;
        };
        let port = || u16_at(rest, 6);
        let holds = match code {
            1 => false,
            2 => usize::from(entry.local_port) >= port(),
            3 => usize::from(entry.local_port) <= port(),
            4 => usize::from(entry.peer_port) >= port(),
            5 => usize::from(entry.peer_port) <= port(),
            6 => entry.autobound,
            7 => host_holds(&rest[4..], entry, &entry.local, entry.local_port),
            8 => host_holds(&rest[4..], entry, &entry.peer, entry.peer_port),
            13 => u64::from_ne_bytes(rest[4..12].try_into().unwrap()) == entry.cgroup,
            9 => u32::from_ne_bytes(rest[4..8].try_into().unwrap()) == entry.interface,
            other => panic!("operation {other}"),
        };
        let step = match holds {
            true => usize::from(yes),
            false => u16_at(rest, 2),
        };
        match rest.get(step..) {
            Some(further) => rest = further,
            None => return false,
        }
    }
}

fn host_holds(condition: &[u8], entry: &Entry, address: &[u8], port: u16) -> bool {
    let (family, length) = (condition[0], condition[1]);
    let wanted_port = i32::from_ne_bytes(condition[4..8].try_into().unwrap());
    let wanted = &condition[8..];
    if wanted_port != -1 && wanted_port != i32::from(port) {
        return false;
    }
    if family != 0 && family != entry.family {
        const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];
        return entry.family == 10
            && family == 2
            && address[..12] == MAPPED
            && same_bits(&address[12..], wanted, length);
    }
    same_bits(address, wanted, length)
}

/// inet_diag_bc_audit.
fn audit(bytecode: &[u8]) {
    assert_eq!(bytecode.len() % 4, 0);
    let mut starts = vec![];
    let mut at = 0;
    while at < bytecode.len() {
        starts.push(at);
        at += usize::from(bytecode[at + 1]);
    }
    assert_eq!(at, bytecode.len(), "`yes` leads beyond the end");
    for &at in &starts {
        let rest = &bytecode[at..];
        let min = match rest[0] {
            1 | 6 => 4,
            2..=5 | 9 => 8,
            13 => 12,
            7 | 8 => {
                let address: u8 = match rest[4] {
                    0 => 0,
                    2 => 4,
                    10 => 16,
                    family => panic!("family {family}"),
                };
                assert!(rest[5] <= 8 * address, "length {}", rest[5]);
                12 + usize::from(address)
            }
            other => panic!("operation {other}"),
        };
        let (yes, no) = (usize::from(rest[1]), u16_at(rest, 2));
        assert!(yes >= min && yes % 4 == 0);
        assert!(no >= min && no <= rest.len() + 4 && no % 4 == 0);
        assert!(no >= rest.len() || starts.contains(&(at + no)));
    }
}

fn tree(text: &str) -> Expression {
    parse(text, &Services::from_text(""))
        .expect(text)
        .expression
}

#[test]
fn bytes_of_simple_expressions() {
    let code = |text| bytecode(&tree(text), StateSet::ALL);
    let port = |port: u16| port.to_ne_bytes();
    let [low, high] = port(80);
    let no = |no: u16| no.to_ne_bytes();
    // S_COND, any family, port 80, then beyond the end.
    let mut equal = vec![7, 12];
    equal.extend(no(16));
    equal.extend([0, 0, 0, 0]);
    equal.extend(80i32.to_ne_bytes());
    assert_eq!(code("sport = :80"), equal);

    let mut at_least = vec![2, 8];
    at_least.extend(no(12));
    at_least.extend([0, 0, low, high]);
    assert_eq!(code("sport >= :80"), at_least);

    for text in [
        "sport = *",
        "src *",
        "sport >= 0",
        "sport <= 65535",
        "state close-wait",
        "state close-wait or sport = :80",
        "not (sport > 65535)",
    ] {
        assert!(code(text).is_empty(), "{text}");
    }
    assert_eq!(code("sport < 0"), [&[1, 4][..], &no(8)].concat());
}

#[test]
fn states_are_the_mask() {
    let close_wait = StateSet::from(TcpState::CloseWait);
    let port = bytecode(&tree("sport = :80"), close_wait);
    for text in [
        "state close-wait sport = :80",
        "sport = :80 and not state established",
        "state established or state close-wait and sport = :80",
        "(state established sport = :22) or (state close-wait sport = :80)",
    ] {
        assert_eq!(bytecode(&tree(text), close_wait), port, "{text}");
    }
}

#[test]
fn what_is_too_long_is_left_to_the_predicate() {
    let ports = |count| {
        let ports = (1..=count).map(|port| Expression::Port(End::Local, port..=port));
        bytecode(&Expression::Any(ports.collect()), StateSet::ALL)
    };
    // 12 bytes a port and 4 for the jump between two.
    assert_eq!(ports(1_000).len(), 16_000 - 4);
    audit(&ports(1_000));
    assert!(ports(1_025).is_empty());
    assert!(ports(60_000).is_empty());
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![Just(End::Local), Just(End::Peer)]
}

/// Few addresses that differ in single bits, so that networks match now and then.
fn v4() -> impl Strategy<Value = Ipv4Addr> {
    (0u8..4, 0u8..4).prop_map(|(a, b)| Ipv4Addr::new(10, 0, a << 6, b))
}

fn v6() -> impl Strategy<Value = Ipv6Addr> {
    prop_oneof![
        (0u16..4, 0u16..4).prop_map(|(a, b)| Ipv6Addr::new(0xfd00, 0, 0, a << 14, 0, 0, 0, b)),
        (0u16..4).prop_map(|b| Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, b)),
    ]
}

fn network() -> impl Strategy<Value = IpNet> {
    let mapped = v4().prop_map(|v4| v4.to_ipv6_mapped());
    prop_oneof![
        (v4(), 0u8..=32).prop_map(|(a, l)| Ipv4Net::new(a, l).unwrap().trunc().into()),
        (prop_oneof![v6(), mapped], 0u8..=128)
            .prop_map(|(a, l)| Ipv6Net::new(a, l).unwrap().trunc().into()),
    ]
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        prop::sample::select(vec![0, 1, 22, 80, 32_767, 32_768, 60_999, 61_000, 65_535]),
        0..=u16::MAX
    ]
}

fn states() -> impl Strategy<Value = StateSet> {
    prop::collection::vec((1u8..=11).prop_map(TcpState::from_kernel), 0..6)
        .prop_map(StateSet::from_iter)
}

fn expression(with_states: bool) -> impl Strategy<Value = Expression> {
    let leaf = prop_oneof![
        (end(), port(), port()).prop_map(|(end, a, b)| Expression::Port(end, a..=b)),
        (end(), port()).prop_map(|(end, a)| Expression::Port(end, a..=a)),
        (end(), network()).prop_map(|(end, network)| Expression::Address(end, network)),
        (0u32..3).prop_map(|index| Expression::Interface(Interface::Index(index))),
        (1u64..4).prop_map(|id| Expression::Cgroup(Cgroup2::Id(id))),
        Just(Expression::Autobound(Ephemeral::Range(EPHEMERAL))),
        states().prop_map(move |states| match with_states {
            true => Expression::State(states),
            false => Expression::over_ipv4(End::Local),
        }),
    ];
    leaf.prop_recursive(5, 48, 4, |inner| {
        let some = prop::collection::vec(inner.clone(), 0..4);
        prop_oneof![
            some.clone().prop_map(Expression::All),
            some.prop_map(Expression::Any),
            inner.prop_map(Expression::negated),
        ]
    })
}

fn facts() -> impl Strategy<Value = SocketFacts> {
    let addresses = prop_oneof![
        (v4(), v4()).prop_map(|(a, b)| (Family::V4, a.into(), b.into())),
        (v4(), v4()).prop_map(|(a, b)| (Family::V6, a.into(), b.into())),
        (v6(), v6()).prop_map(|(a, b)| (Family::V6, a.into(), b.into())),
    ];
    let cgroup = prop::option::of(1u64..4);
    (addresses, port(), port(), 1u8..=11, 0u32..3, cgroup).prop_map(
        |((family, local, peer), local_port, peer_port, state, interface, cgroup): (
            (Family, IpAddr, IpAddr),
            _,
            _,
            _,
            _,
            _,
        )| SocketFacts {
            family,
            tuple: Tuple {
                local: SocketAddr::new(local, local_port),
                peer: SocketAddr::new(peer, peer_port),
            },
            state: TcpState::from_kernel(state),
            interface,
            cgroup,
        },
    )
}

fn selectors() -> impl Strategy<Value = Selectors> {
    let ranges = || prop::collection::vec((port(), port()).prop_map(|(a, b)| a..=b), 0..3);
    // As --local and --peer give them: an IPv4-mapped network is one of IPv4.
    let canonical = |network: IpNet| match network {
        IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some() && v6.prefix_len() >= 96 => {
            let address = v6.addr().to_ipv4_mapped().unwrap();
            Ipv4Net::new(address, v6.prefix_len() - 96).unwrap().into()
        }
        other => other,
    };
    let networks = move || prop::collection::vec(network().prop_map(canonical), 0..3);
    let version = prop::sample::select(vec![None, Some(IpVersion::V4), Some(IpVersion::V6)]);
    (
        ranges(),
        ranges(),
        networks(),
        networks(),
        version,
        expression(false),
    )
        .prop_map(
            |(ports, peer_ports, local, peer, ip_version, expression)| Selectors {
                ports,
                peer_ports,
                local,
                peer,
                ip_version,
                expression,
                states: StateSet::ALL,
                ..Selectors::default()
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn bytecode_and_predicate_are_one(
        expression in expression(false),
        facts in prop::collection::vec(facts(), 1..20),
    ) {
        let bytecode = bytecode(&expression, StateSet::ALL);
        audit(&bytecode);
        for facts in &facts {
            prop_assert_eq!(run(&bytecode, &facts.into()), expression.matches(facts), "{:?}", facts);
        }
    }

    #[test]
    fn with_states_the_bytecode_loses_nothing(
        expression in expression(true),
        mask in states(),
        facts in prop::collection::vec(facts(), 1..20),
    ) {
        let bytecode = bytecode(&expression, mask);
        audit(&bytecode);
        for facts in facts.iter().filter(|facts| mask.contains(facts.state)) {
            if expression.matches(facts) {
                prop_assert!(run(&bytecode, &facts.into()), "{:?}", facts);
            }
        }
    }

    #[test]
    fn in_one_state_they_are_one_with_states_too(
        expression in expression(true),
        facts in facts(),
    ) {
        let bytecode = bytecode(&expression, facts.state.into());
        prop_assert_eq!(run(&bytecode, &(&facts).into()), expression.matches(&facts));
    }

    #[test]
    fn selectors_and_their_expression_are_one(selectors in selectors(), facts in facts()) {
        let mut message = stuck("10.0.0.1:1", "10.0.0.2:2", 1);
        message.id = DiagId::example(facts.family, facts.tuple, Cookie(1));
        message.state = facts.state;
        let socket = Socket::from_message(&message);
        let facts = SocketFacts { interface: 0, cgroup: None, ..facts };
        prop_assert_eq!(
            selectors.as_expression().matches(&facts),
            selectors.match_socket(&socket)
        );
    }

    #[test]
    fn the_states_an_expression_can_match_in(expression in expression(true), facts in facts()) {
        use crate::filter::expr::States;
        if let States::Within(states) = expression.states() && expression.matches(&facts) {
            prop_assert!(states.contains(facts.state));
        }
    }
}
