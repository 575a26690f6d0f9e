//! Where `cwkill gateway` sends its questions, on routers whose routes depend on more than addresses, and on one that is a proxy. The tests
//! need nft(8) and ip(8).

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Result;
use netns_harness::{Agent, Dial, Family, Host, Nat, Side, SocketOption, address, wait_for};

use crate::gateway::Gateway;
use crate::gateway_cut::{all_are, carries_data, connections, results};
use crate::support::{PATIENCE, at, ran};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_rule_for_the_port_chooses_the_neighbour),
    each_family!(a_route_with_several_hops_is_used_if_the_hash_is_known),
    each_family!(tables_by_interface_of_arrival_are_used),
    once!(with_two_possible_paths_a_connection_is_left_alone),
    once!(a_mark_that_may_be_that_of_the_packets_counts),
    once!(what_the_routes_lead_to_this_host_is_left_alone),
    each_family!(connections_of_a_transparent_proxy_are_left_to_cwkill),
    once!(neighbours_that_do_not_answer_are_waited_for_together),
    once!(the_hash_over_addresses_chooses_the_same_hop_as_the_kernel),
    each_family!(what_a_policy_of_ipsec_covers_is_left_alone),
];

/// Another host behind the router, and its network.
const THIRD: &str = "third";
const THIRD_NETWORK: u8 = 3;
/// The port to which the client connects.
const PORT: u16 = 7000;

fn sh(host: &Host, script: &str) -> Result<()> {
    ran(host.command("sh").args(["-ec", script]))?.exits(0);
    Ok(())
}

/// The option of ip(8) for the family.
fn version(family: Family) -> &'static str {
    match family {
        Family::V4 | Family::Mapped => "-4",
        Family::V6 => "-6",
    }
}

fn prefix(family: Family, address: IpAddr) -> String {
    let bits = if version(family) == "-4" { 32 } else { 128 };
    format!("{address}/{bits}")
}

/// A server and another host that have the same address.
struct Twins {
    gateway: Gateway,
    third: Host,
    other: Agent,
    /// The address.
    shared: IpAddr,
}

impl Twins {
    fn start(family: Family) -> Result<Self> {
        let mut gateway = Gateway::start(family, Nat::None)?;
        let third = gateway.lab.add_host(THIRD, THIRD_NETWORK)?;
        let shared = address(family, 9, 9);
        for host in [&gateway.lab.server, &third] {
            sh(
                host,
                &format!("ip addr add {} dev lo", prefix(family, shared)),
            )?;
        }
        gateway.to = SocketAddr::new(shared, PORT);
        let other = third.agent("other")?;
        let any = match family {
            Family::V4 => "0.0.0.0",
            Family::V6 | Family::Mapped => "::",
        };
        other.listen(
            SocketAddr::new(any.parse()?, PORT),
            family == Family::V6,
            1024,
        )?;
        Ok(Twins {
            gateway,
            third,
            other,
            shared,
        })
    }
}

fn a_rule_for_the_port_chooses_the_neighbour(family: Family) -> Result<()> {
    let twins = Twins::start(family)?;
    let (gateway, ip) = (&twins.gateway, version(family));
    let (server, third) = (Side::Server.host(family), address(family, THIRD_NETWORK, 2));
    let shared = prefix(family, twins.shared);
    gateway.sh(&format!(
        "ip {ip} route add {shared} via {third}
         ip {ip} rule add ipproto tcp dport {PORT} lookup 77
         ip {ip} route add {shared} via {server} table 77"
    ))?;
    let pairs = gateway.connect(2)?;
    let ran = gateway.gateway("--probe --all --json")?;
    all_are(&ran.exits(0), "alive", 2);
    carries_data(gateway, pairs[0])?;
    let ran = gateway.gateway("--cut --all --active --json")?;
    all_are(&ran.exits(0), "cut", 2);
    for host in [&gateway.lab.client, &gateway.lab.server] {
        assert_eq!(connections(host)?, 0);
    }
    Ok(())
}

/// ECMP. The hash over addresses is known. That over ports is not: where the link has hashed a packet, the kernel takes this number.
fn a_route_with_several_hops_is_used_if_the_hash_is_known(family: Family) -> Result<()> {
    let twins = Twins::start(family)?;
    let (gateway, ip) = (&twins.gateway, version(family));
    let (server, third) = (Side::Server.host(family), address(family, THIRD_NETWORK, 2));
    let set_policy = |policy: u8| {
        gateway.sh(&format!(
            "for family in ipv4 ipv6; do echo {policy} > /proc/sys/net/$family/fib_multipath_hash_policy; done"
        ))
    };
    // By addresses.
    set_policy(0)?;
    gateway.sh(&format!(
        "ip {ip} route add {} nexthop via {server} nexthop via {third}",
        prefix(family, twins.shared)
    ))?;
    let dial = Dial::default();
    gateway.client.connect(gateway.to, 2, dial, PATIENCE)?;
    let counts =
        || -> Result<usize> { Ok(connections(&gateway.lab.server)? + connections(&twins.third)?) };
    set_policy(1)?;
    for line in ["--probe --all --json", "--cut --all --active --json"] {
        let ran = gateway.gateway(line)?.exits(4);
        all_are(&ran, "skipped", 2);
        for connection in results(&ran) {
            let code = at(&connection, "/result/reason_code");
            assert_eq!(code, "ambiguous-path", "{ran:?}");
        }
    }
    assert_eq!(counts()?, 2);
    set_policy(0)?;
    if ip == "-6" {
        // The flow label is in the hash.
        let ran = gateway.gateway("--cut --all --active --json")?.exits(4);
        all_are(&ran, "skipped", 2);
        return Ok(());
    }
    let ran = gateway.gateway("--cut --all --active --json")?;
    all_are(&ran.exits(0), "cut", 2);
    assert_eq!(counts()?, 0);
    assert_eq!(connections(&gateway.lab.client)?, 0);
    assert!(twins.other.is_alive());
    Ok(())
}

/// The main table knows neither network.
fn tables_by_interface_of_arrival_are_used(family: Family) -> Result<()> {
    let gateway = Gateway::start(family, Nat::None)?;
    let ip = version(family);
    for side in [Side::Client, Side::Server] {
        let (link, host) = (side.link(), prefix(family, side.host(family)));
        gateway.sh(&format!(
            "ip {ip} rule add iif {link} lookup 77
             ip {ip} route add {host} dev {link} table 77
             ip {ip} route flush dev {link} table main"
        ))?;
    }
    gateway.connect(2)?;
    let ran = gateway.gateway("--cut --all --active --json")?;
    all_are(&ran.exits(0), "cut", 2);
    for host in [&gateway.lab.client, &gateway.lab.server] {
        assert_eq!(connections(host)?, 0);
    }
    Ok(())
}

/// Asserts that the two connections of the gateway are left alone for this reason.
#[track_caller]
fn are_left_alone(gateway: &Gateway, code: &str) -> Result<()> {
    for line in ["--probe --all --json", "--cut --all --active --json"] {
        let ran = gateway.gateway(line)?.exits(4);
        all_are(&ran, "skipped", 2);
        for connection in results(&ran) {
            assert_eq!(at(&connection, "/result/reason_code"), code, "{ran:?}");
        }
    }
    for host in [&gateway.lab.client, &gateway.lab.server] {
        assert_eq!(connections(host)?, 2);
    }
    assert_eq!(gateway.listed("")?.len(), 2);
    Ok(())
}

/// Packets of the client may also arrive from a third host, to which the answers would then go.
fn with_two_possible_paths_a_connection_is_left_alone() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let _third = gateway.lab.add_host(THIRD, THIRD_NETWORK)?;
    gateway.connect(2)?;
    let third = address(Family::V4, THIRD_NETWORK, 2);
    gateway.sh(&format!(
        "ip link property add dev {THIRD} altname uplink
         ip route add default via {third} table 88"
    ))?;
    // A rule can have either name of the interface.
    for name in [THIRD, "uplink"] {
        gateway.sh(&format!("ip rule add iif {name} lookup 88"))?;
        are_left_alone(&gateway, "ambiguous-path")?;
        gateway.sh(&format!("ip rule del iif {name} lookup 88"))?;
    }
    let ran = gateway.gateway("--cut --all --active --json")?;
    all_are(&ran.exits(0), "cut", 2);
    Ok(())
}

/// The mark of the entry is that of the packets, as `meta mark set ct mark` does, or it is not.
fn a_mark_that_may_be_that_of_the_packets_counts() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let _third = gateway.lab.add_host(THIRD, THIRD_NETWORK)?;
    gateway.nft(
        "table inet marks {
            chain forward {
                type filter hook forward priority 10;
                ct mark set 5
            }
        }",
    )?;
    gateway.connect(2)?;
    let (server, third) = (
        prefix(Family::V4, Side::Server.host(Family::V4)),
        address(Family::V4, THIRD_NETWORK, 2),
    );
    gateway.sh(&format!(
        "ip rule add fwmark 5 lookup 88
         ip route add {server} via {third} table 88"
    ))?;
    are_left_alone(&gateway, "ambiguous-path")?;
    // Another mark says nothing.
    gateway.sh("ip rule del fwmark 5; ip rule add fwmark 6 lookup 88")?;
    let ran = gateway.gateway("--cut --all --active --json")?;
    all_are(&ran.exits(0), "cut", 2);
    Ok(())
}

fn what_the_routes_lead_to_this_host_is_left_alone() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    gateway.connect(2)?;
    gateway.sh("ip rule add iif client lookup 88
         ip route add local default dev lo table 88")?;
    are_left_alone(&gateway, "path-ends-here")
}

/// Its sockets have the addresses of other hosts, and conntrack shows the connections like forwarded ones.
fn connections_of_a_transparent_proxy_are_left_to_cwkill(family: Family) -> Result<()> {
    const PROXY: u16 = 8000;
    let gateway = Gateway::start(family, Nat::None)?;
    gateway.connect(1)?;
    let (ip, local) = match version(family) {
        "-4" => ("ip", "127.0.0.1"),
        _ => ("ip6", "[::1]"),
    };
    gateway.sh(&format!(
        "ip {0} rule add fwmark 1 lookup 88
         ip {0} route add local default dev lo table 88",
        version(family)
    ))?;
    gateway.nft(&format!(
        "table {ip} proxy {{
            chain prerouting {{
                type filter hook prerouting priority -150;
                iifname client tcp dport 80 tproxy to {local}:{PROXY} meta mark set 1 accept
            }}
        }}"
    ))?;
    let proxy = gateway.lab.router.agent("proxy")?;
    let any = match family {
        Family::V4 => "0.0.0.0",
        Family::V6 | Family::Mapped => "::",
    };
    let listener = proxy.listen(SocketAddr::new(any.parse()?, PROXY), false, 16)?;
    proxy.set_option(&[listener], SocketOption::Transparent(true))?;
    let to = SocketAddr::new(gateway.to.ip(), 80);
    gateway.client.connect(to, 2, Dial::default(), PATIENCE)?;
    let accepted = proxy.accept(listener, 2, PATIENCE)?;
    assert_eq!(accepted[0].local, to);
    let ran = gateway.gateway("--json")?.exits(0);
    let document = ran.json();
    let counts = (
        at(&document, "/ending_here"),
        at(&document, "/summary/matched"),
    );
    assert_eq!(counts, ("2".into(), "1".into()), "{ran:?}");
    let ran = gateway.gateway("--cut --all --active --json")?;
    all_are(&ran.exits(0), "cut", 1);
    assert_eq!(connections(&gateway.lab.client)?, 2);
    Ok(())
}

/// Connections to many addresses of one network, none of which answers any more.
fn neighbours_that_do_not_answer_are_waited_for_together() -> Result<()> {
    const COUNT: u8 = 24;
    // The kernel needs three seconds for one of them.
    const LIMIT: Duration = Duration::from_secs(40);
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    for host in 101..101 + COUNT {
        let dead = address(Family::V4, 2, host);
        sh(
            &gateway.lab.server,
            &format!("ip addr add {dead}/24 dev eth0"),
        )?;
        let to = SocketAddr::new(dead, PORT);
        gateway.client.connect(to, 1, Dial::default(), PATIENCE)?;
    }
    // One that lives.
    let third = gateway.lab.add_host(THIRD, THIRD_NETWORK)?;
    let other = third.agent("other")?;
    let to = SocketAddr::new(address(Family::V4, THIRD_NETWORK, 2), PORT);
    other.listen(to, false, 16)?;
    gateway.client.connect(to, 1, Dial::default(), PATIENCE)?;
    gateway.lab.server.set_link("eth0", false)?;
    gateway.sh("ip neigh flush dev server")?;
    let begun = Instant::now();
    let ran = gateway.gateway("--cut --all --active --json")?.exits(4);
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    let codes = results(&ran);
    let codes = codes.iter().map(|one| at(one, "/result/reason_code"));
    let codes: Vec<String> = codes.filter(|code| code != "null").collect();
    assert_eq!(codes, vec!["no-path"; usize::from(COUNT)], "{ran:?}");
    wait_for(PATIENCE, || Ok(connections(&third)? == 0))
}

/// Policy 2 takes the addresses of the inner packet, if there is one, and for TCP those of the packet itself.
fn the_hash_over_addresses_chooses_the_same_hop_as_the_kernel() -> Result<()> {
    const COUNT: u8 = 24;
    let twins = Twins::start(Family::V4)?;
    let gateway = &twins.gateway;
    let (server, third) = (
        Side::Server.host(Family::V4),
        address(Family::V4, THIRD_NETWORK, 2),
    );
    gateway.sh(&format!(
        "ip route add {} nexthop via {server} nexthop via {third}",
        prefix(Family::V4, twins.shared)
    ))?;
    for policy in [0, 2] {
        gateway.sh(&format!(
            "echo {policy} > /proc/sys/net/ipv4/fib_multipath_hash_policy"
        ))?;
        for host in 101..101 + COUNT {
            let from = address(Family::V4, 1, host);
            sh(
                &gateway.lab.client,
                &format!("ip addr replace {from}/24 dev eth0"),
            )?;
            let dial = Dial {
                from: Some(SocketAddr::new(from, 0)),
                ..Dial::default()
            };
            gateway.client.connect(gateway.to, 1, dial, PATIENCE)?;
        }
        let at_hops = [&gateway.lab.server, &twins.third];
        let counts = at_hops.map(connections);
        let [one, other] = counts.map(Result::unwrap);
        assert_eq!(one + other, usize::from(COUNT));
        // All at one of them: one in 2^23.
        assert!(one > 0 && other > 0, "{policy}: {one} and {other}");
        let ran = gateway.gateway("--cut --all --active --json")?;
        all_are(&ran.exits(0), "cut", usize::from(COUNT));
        for host in [&gateway.lab.client, &gateway.lab.server, &twins.third] {
            assert_eq!(connections(host)?, 0, "{policy}");
        }
    }
    assert!(twins.other.is_alive());
    Ok(())
}

/// A tunnel, whose other end does not exist: the kernel sends nothing of what it covers.
fn what_a_policy_of_ipsec_covers_is_left_alone(family: Family) -> Result<()> {
    let gateway = Gateway::start(family, Nat::Masquerade)?;
    let pairs = gateway.connect(2)?;
    let [client, masqueraded, server] = [
        Side::Client.host(family),
        Side::Server.router(family),
        Side::Server.host(family),
    ];
    let add = |from: &str, to: &str, way: &str| {
        gateway.sh(&format!(
            "ip xfrm policy add src {from} dst {to} dir {way} priority 10 tmpl src {masqueraded} dst {server} proto esp mode tunnel"
        ))
    };
    let [of_client, of_nat, of_server] =
        [client, masqueraded, server].map(|address| prefix(family, address));
    let anything = if version(family) == "-4" {
        "0.0.0.0/0"
    } else {
        "::/0"
    };
    for (from, to, way) in [
        (&*of_client, &*of_server, "out"),
        (&of_server, &of_client, "out"),
        // Once more after the source is translated.
        (&of_nat, &of_server, "out"),
        (&of_client, anything, "fwd"),
        // Packets that arrive are compared before their destination is translated.
        (&of_server, &of_nat, "fwd"),
        (anything, anything, "out"),
    ] {
        add(from, to, way)?;
        are_left_alone(&gateway, "ipsec-policy")?;
        gateway.sh("ip xfrm policy flush")?;
    }
    // Other packets, and those to this host.
    add(&of_nat, &of_client, "out")?;
    add(&of_server, &of_client, "fwd")?;
    add(&of_nat, &of_server, "fwd")?;
    add(anything, anything, "in")?;
    carries_data(&gateway, pairs[0])?;
    // An exception from a tunnel for all.
    add(anything, anything, "out")?;
    for (from, to) in [
        (&of_client, &of_server),
        (&of_server, &of_client),
        (&of_nat, &of_server),
    ] {
        gateway.sh(&format!(
            "ip xfrm policy add src {from} dst {to} dir out priority 5"
        ))?;
    }
    carries_data(&gateway, pairs[0])?;
    let ran = gateway.gateway("--cut --all --active --json")?;
    all_are(&ran.exits(0), "cut", 2);
    for host in [&gateway.lab.client, &gateway.lab.server] {
        assert_eq!(connections(host)?, 0);
    }
    Ok(())
}
