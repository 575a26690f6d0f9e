//! The runs of the golden tests.

use super::builder::{Case, Drained, Listening, Matched, Who, case, socket};
use super::dead_builder::{Dead, DeadCase, dead, dead_case};
use super::words::{ATTEMPTS, EXCLUSIONS, KEPT, SKIPS};
use crate::model::DrainReason;
use crate::proc::OwnerKind;

const ID: &str = "0::/system.slice/docker-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef.scope";
const POD: &str = "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod8f2a1c3d_1111_2222_3333_444455556666.slice/\
    cri-containerd-fedcba9876543210fedcba9876543210fedcba9876543210fedcba9876543210.scope";

static JAVA: Who = Who("java", 4421, "0::/user.slice");
static NODE: Who = Who("node", 4500, "0::/");
static WORKER: Who = Who("worker", 4501, "0::/");
static HELPER: Who = Who("helper", 4502, "0::/");
static FIFTH: Who = Who("fifth", 4503, "0::/");
static NGINX: Who = Who("nginx", 812, "0::/system.slice/nginx.service");
static ESCAPED: Who = Who("db", 900, "0::/system.slice/my\\x2ddb.service");
static DOCKER: Who = Who("app", 1200, ID);
static KUBE: Who = Who("pod-app", 1300, POD);
static LXC: Who = Who("init", 1400, "0::/lxc.payload.web/init.scope");
static EVIL: Who = Who(
    "e\x1b[2J\nil\u{202e}\u{9b}é名",
    666,
    "0::/system.slice/e\u{7}vil.service",
);

static WEB: Listening = Listening("0.0.0.0:80", 3, 128, &[(&NGINX, 6)]);
static MANY: Listening = Listening("[::]:8080", 129, 128, &[(&JAVA, 5), (&JAVA, 8), (&NODE, 5)]);
static NOBODYS: Listening = Listening("127.0.0.1:99", 1, 5, &[]);
static EMPTIED: Listening = Listening("127.0.0.1:98", 0, 5, &[(&NODE, 4)]);
static LAST: Listening = Listening("127.0.0.1:97", 1, 5, &[(&NODE, 3)]);

/// A socket of a run that has many, each with its own peer.
fn numbered(number: usize) -> Matched {
    let port = 1000 + u16::try_from(number).expect("a port");
    let cookie = u64::from(port) << 32 | 7;
    socket("10.0.0.1:80", &format!("10.0.0.2:{port}"), cookie)
}

/// One owned by JAVA, to be closed by shutdown, then destroy.
fn owned(number: usize) -> Matched {
    let fd = 20 + i32::try_from(number).expect("a descriptor");
    numbered(number)
        .owner(&JAVA, fd)
        .plan(["shutdown", "destroy"])
}

fn one_each<'w, T>(
    words: &'w [&'static str],
    make: impl Fn(usize, &'static str) -> T + 'w,
) -> Vec<T> {
    let pairs = words.iter().enumerate();
    pairs.map(|(number, word)| make(number, word)).collect()
}

pub fn listings() -> Vec<Case> {
    let mixed = || {
        [
            socket("10.0.0.1:80", "10.0.0.2:5001", 1)
                .owner(&JAVA, 7)
                .queues(0, 0)
                .age_ms(90_000_000),
            socket("10.0.0.1:80", "10.0.0.2:5002", 2)
                .owner(&JAVA, 8)
                .queues(1461, 0)
                .age_ms(3_725_000),
            socket("10.0.0.1:80", "10.0.0.2:5003", 3)
                .mapped()
                .owner(&JAVA, 9)
                .queues(1, 4_294_967_295)
                .age_ms(61_000),
            socket("[2001:db8::1]:443", "[2001:db8::2]:5004", 4)
                .owner(&NODE, 10)
                .state("established")
                .age_ms(59_000),
            socket("[fe80::1]:443", "[fe80::2]:5005", 5)
                .state("last-ack")
                .queues(0, 1)
                .inode(0)
                .age_ms(7),
            socket("127.0.0.1:80", "127.0.0.1:5006", 6)
                .state("fin-wait-1")
                .inode(0)
                .uid(0),
            socket("127.0.0.1:80", "127.0.0.1:5007", 7)
                .state("fin-wait-2")
                .owner(&NODE, 11),
            socket("127.0.0.1:80", "127.0.0.1:5008", 8)
                .state("closing")
                .owner(&NODE, 12)
                .queues(0, 1),
            socket("127.0.0.1:80", "127.0.0.1:5009", 9)
                .state("time-wait")
                .inode(0),
            socket("127.0.0.1:80", "127.0.0.1:5010", 10)
                .state("syn-recv")
                .waits_at(&WEB),
            socket("127.0.0.1:80", "0.0.0.0:0", 11)
                .state("listen")
                .owner(&NGINX, 6)
                .queues(3, 128),
            socket("127.0.0.1:80", "127.0.0.1:5012", 12)
                .state("syn-sent")
                .owner(&NODE, 13),
            socket("127.0.0.1:80", "127.0.0.1:5013", 13)
                .state("close")
                .owner(&NODE, 14)
                .ageless(),
            socket("127.0.0.1:80", "127.0.0.1:5014", u64::MAX)
                .state("42")
                .owner(&NODE, 15),
            socket("127.0.0.1:80", "127.0.0.1:5015", 15)
                .waits_at(&WEB)
                .queues(1, 0),
        ]
    };
    let placed = || {
        [
            socket("10.0.0.1:80", "10.0.0.2:1", 1)
                .owner(&NGINX, 7)
                .owner(&NGINX, 8)
                .owner(&NGINX, 9),
            socket("10.0.0.1:80", "10.0.0.2:2", 2)
                .owner(&DOCKER, 7)
                .owner(&NGINX, 8)
                .owner(&NGINX, 9),
            socket("10.0.0.1:80", "10.0.0.2:3", 3)
                .owner(&KUBE, 7)
                .owner(&LXC, 3)
                .netns(1)
                .uid(0),
            socket("10.0.0.1:80", "10.0.0.2:4", 4)
                .owner(&LXC, 7)
                .owner(&NODE, 3)
                .netns(2),
            socket("10.0.0.1:80", "10.0.0.2:5", 5)
                .owner(&ESCAPED, 7)
                .netns(1),
            socket("10.0.0.1:80", "10.0.0.2:6", 6)
                .owner(&NODE, 7)
                .netns(3),
            socket("10.0.0.1:80", "10.0.0.2:7", 7).waits_at(&WEB),
        ]
    };
    let everywhere = |name, arguments| {
        case(name, arguments)
            .sockets(placed())
            .another_netns(4_026_532_001, Some("blue"))
            .another_netns(4_026_532_002, None)
            .another_netns(4_026_532_003, Some("gr\x1b[1mey\u{200b}"))
    };
    let waiting = || {
        [
            socket("10.0.0.1:80", "10.0.0.2:1", 1).waits_at(&WEB),
            socket("[::1]:8080", "[::1]:2", 2).waits_at(&MANY),
            socket("[::1]:8080", "[::1]:3", 3).waits_at(&MANY),
            socket("127.0.0.1:99", "127.0.0.1:4", 4).waits_at(&NOBODYS),
            socket("127.0.0.1:77", "127.0.0.1:5", 5).inode(0),
        ]
    };
    let stray = || [numbered(0).owner(&NODE, 3), numbered(1), numbered(2)];
    let evil = || {
        let handshake = socket("10.0.0.1:80", "10.0.0.2:2", 2).waits_at(&WEB);
        [numbered(0).owner(&EVIL, 3).owner(&NODE, 4), handshake]
    };
    vec![
        case("listing-causes-and-states", "").sockets(mixed()),
        case("dry-run-states", "--state last-ack -n").sockets(mixed()),
        case("listing-close-wait", "").sockets([
            numbered(0).owner(&JAVA, 7),
            numbered(1).owner(&JAVA, 8).queues(0, 0).age_ms(999),
            numbered(2).owner(&JAVA, 9).ageless(),
        ]),
        case("listing-address-gone", "").sockets([
            numbered(0).owner(&JAVA, 7).address_gone(),
            numbered(1).owner(&JAVA, 8),
        ]),
        case("listing-one", "").sockets([numbered(0).owner(&JAVA, 7)]),
        case("listing-no-header", "--no-header").sockets(placed().into_iter().take(2)),
        everywhere("listing-namespaces-and-places", "--netns all"),
        case("listing-never-accepted", "").sockets(waiting()),
        case("listing-reuseport", "").sockets([
            numbered(0).waits_at(&WEB).in_group(3, &[]),
            numbered(1).waits_at(&MANY).in_group(4, &[(7, 128)]),
        ]),
        case("listing-never-accepted-no-owners", "--no-owners").sockets(waiting()),
        case("listing-no-owners", "--no-owners").sockets(stray()),
        case("listing-unknown-owners", "").sockets(stray()),
        case("listing-unknown-owner", "").sockets(stray().into_iter().skip(2)),
        case("listing-unreadable-process", "")
            .sockets(stray())
            .unreadable_processes(1),
        case("listing-unreadable-processes", "")
            .sockets(stray())
            .unreadable_processes(12),
        case("listing-hidden-processes", "")
            .sockets(stray())
            .hidden_processes()
            .unreadable_processes(1),
        case("listing-unreadable-orphan", "")
            .sockets([numbered(0).inode(0).state("last-ack")])
            .unreadable_processes(1),
        case("listing-unreadable-all-owned", "")
            .sockets(stray().into_iter().take(1))
            .unreadable_processes(3),
        case("listing-undecided", "-n --process java")
            .sockets(stray())
            .undecided(1)
            .unreadable_processes(1),
        case("listing-hostile-names", "").sockets(evil()),
        case("listing-long", "")
            .sockets((0..1030).map(|number| match number {
                1010 => numbered(number).owner(&EVIL, 7).queues(1_000_000_000, 0),
                _ => numbered(number).owner(&JAVA, 7),
            }))
            .long(),
        case("nothing", ""),
        case("nothing-to-do", "--all"),
        case("nothing-dry-run", "--all -n"),
        case("nothing-but-in-use", "--port 80").in_use(2),
        case("dry-run-in-use", "--port 80 -n --min-idle 90s")
            .sockets([socket("10.0.0.1:80", "10.0.0.2:1", 1)
                .owner(&NGINX, 7)
                .plan(["destroy"])])
            .in_use(1),
        case("nothing-undecided", "--pid 7").undecided(2),
        case("nothing-but-younger", "--port 80 --min-age 10m").younger(3),
        case(
            "nothing-but-younger-and-in-use",
            "--port 80 --min-age 10m -n",
        )
        .younger(1)
        .in_use(2),
        case("nothing-but-dead", "--port 80 --reclaim").dead(&JAVA, 19),
        case("nothing-but-dead-ones", "--port 80 --reclaim -n")
            .dead(&JAVA, 19)
            .dead(&NODE, 1),
        case("nothing-here", "").namespaces_not_looked_into(3),
        case("nothing-to-do-here", "--port 80").namespaces_not_looked_into(1),
        case("nothing-no-process", "--pid 8080").absent(OwnerKind::Pid, "8080"),
        case("nothing-no-owners", "-n --process evil\u{7} --unit web")
            .absent(OwnerKind::Process, "evil\u{7}")
            .absent(OwnerKind::Unit, "web"),
        case("nothing-unreachable-namespace", "--netns all").unreachable_namespaces(1, None),
        case("nothing-unreachable-namespaces", "--netns all")
            .unreachable_namespaces(2, Some("opening it: no")),
        case("nothing-unknown-namespace", "--netns all").unknown_namespaces(1),
        case("listing-blind", "--netns all")
            .sockets(stray())
            .unreachable_namespaces(1, Some("cannot enter it"))
            .unknown_namespaces(2)
            .undecided(3)
            .hidden_processes(),
    ]
}

pub fn plans() -> Vec<Case> {
    let excluded = |number, why| {
        numbered(number)
            .owner(&NODE, 3)
            .plan(["destroy"])
            .exclude("shutdown", why)
    };
    let hopeless = |number, why| {
        numbered(100 + number)
            .exclude("destroy", why)
            .exclude("rst", "no-owner")
    };
    let mut all = one_each(&EXCLUSIONS, excluded);
    all.extend(one_each(&EXCLUSIONS, hopeless));
    all.push(
        numbered(200)
            .owner(&NODE, 3)
            .plan(["probe", "shutdown", "destroy", "rst"]),
    );
    all.push(
        numbered(201)
            .owner(&NODE, 3)
            .exclude("rst", "needs-net-raw")
            .over_limit(),
    );
    let kept = |number, why| owned(number).reclaim(why);
    let mut reclaims = one_each(&KEPT, kept);
    reclaims.push(owned(100));
    reclaims.push(
        numbered(101)
            .owner(&NODE, 3)
            .exclude("shutdown", "unsent")
            .reclaim("in-epoll"),
    );
    reclaims.push(
        owned(102)
            .owner(&JAVA, 300)
            .reclaim("in-epoll")
            .owner(&NODE, 4)
            .reclaim("in-epoll")
            .owner(&WORKER, 4)
            .reclaim("in-ring"),
    );
    reclaims.push(numbered(103).plan(["destroy"]));
    reclaims.push(numbered(104).owner(&NODE, 3).over_limit());
    let needs = |name, arguments, why| {
        case(name, arguments).sockets([numbered(0).owner(&NODE, 3).exclude("destroy", why)])
    };
    vec![
        case("dry-run", "--all -n --method probe,shutdown,destroy,rst").sockets(all),
        case("dry-run-colored", "--all -n")
            .sockets([owned(0)])
            .colored(),
        case("dry-run-reclaim", "--all -n --reclaim").sockets(reclaims),
        case("act-over-limit", "--all --max-kills 1").sockets([
            owned(0).closed_by("shutdown").no_longer_open(),
            owned(1)
                .plan([])
                .exclude("rst", "needs-net-raw")
                .over_limit()
                .skipped("over-limit"),
        ]),
        needs("dry-run-needs-net-admin", "--all -n", "needs-net-admin"),
        needs("dry-run-needs-net-raw", "--all -n", "needs-net-raw"),
        needs("dry-run-needs-ptrace", "--all -n", "needs-ptrace"),
        needs("listing-needs-net-admin", "", "needs-net-admin"),
    ]
}

pub fn acts() -> Vec<Case> {
    let skipped = |number, why: &'static str| match why {
        "no-method" => numbered(number)
            .exclude("shutdown", "no-owner")
            .exclude("destroy", "needs-net-admin")
            .skipped(why),
        "over-limit" => numbered(number).owner(&JAVA, 9).over_limit().skipped(why),
        _ => owned(number)
            .attempt("shutdown", "descriptors-gone")
            .skipped(why),
    };
    let failing = |number, why| {
        owned(number)
            .attempt("shutdown", "descriptors-gone")
            .attempt("destroy", why)
            .failed()
    };
    let closed = || {
        [
            owned(0).closed_by("shutdown").no_longer_open(),
            owned(1).closed_by("shutdown").still_open(),
            owned(2).closed_by("shutdown"),
            owned(3)
                .no_longer_open()
                .owner(&NODE, 3)
                .closed_by("shutdown")
                .still_open(),
            owned(4)
                .no_longer_open()
                .owner(&NODE, 3)
                .closed_by("shutdown"),
            owned(5)
                .attempt("shutdown", "denied-ptrace")
                .closed_by("destroy")
                .still_open(),
            owned(6)
                .attempt("shutdown", "descriptors-gone")
                .attempt("destroy", "not-supported")
                .closed_by("rst"),
            numbered(7).plan(["destroy"]).closed_by("destroy"),
            numbered(8)
                .state("last-ack")
                .inode(0)
                .plan(["destroy"])
                .closed_by("destroy"),
            numbered(9)
                .plan(["probe", "destroy"])
                .tried("probe")
                .closed_by("destroy"),
        ]
    };
    let others = || {
        [
            owned(20).closing("shutdown", "last-ack").still_open(),
            owned(21)
                .attempt("shutdown", "os")
                .closing("destroy", "fin-wait-1"),
            owned(22).gone(),
            owned(23).attempt("shutdown", "gone").gone(),
            owned(24)
                .tried("shutdown")
                .attempt("destroy", "not-supported")
                .failed(),
        ]
    };
    let backlog = || {
        let closed = |number: u64, listener| {
            let local = format!("127.0.0.1:{}", 90 + number);
            let never = socket(&local, "127.0.0.1:5", 50 + number).waits_at(listener);
            never.plan(["destroy"]).exclude("shutdown", "not-accepted")
        };
        [
            closed(1, &WEB).closed_by("destroy"),
            closed(2, &MANY).closed_by("destroy"),
            closed(3, &MANY).closed_by("destroy"),
            closed(4, &NOBODYS).closed_by("destroy"),
            closed(5, &EMPTIED).closed_by("destroy"),
            closed(6, &LAST).closed_by("destroy"),
            closed(7, &LAST).closed_by("destroy"),
            closed(8, &WEB).skipped("accepted"),
        ]
    };
    let unowned = |number| {
        numbered(number)
            .plan(["destroy"])
            .exclude("shutdown", "owners-not-searched")
    };
    let four = || {
        numbered(0)
            .owner(&JAVA, 3)
            .owner(&NODE, 3)
            .owner(&WORKER, 3)
            .owner(&HELPER, 3)
    };
    let done = |name, arguments| {
        case(name, arguments).sockets([owned(0).closed_by("shutdown").no_longer_open()])
    };
    let interrupted = [
        owned(0).closed_by("shutdown").still_open(),
        owned(1).attempt("shutdown", "descriptors-gone").failed(),
        owned(2).skipped("interrupted"),
        owned(3).closing("shutdown", "last-ack"),
    ];
    vec![
        case("act", "--all")
            .sockets(closed())
            .sockets(others())
            .colored(),
        case("act-namespaces", "--all --netns all")
            .sockets([
                owned(0).closed_by("shutdown").still_open(),
                numbered(1)
                    .owner(&DOCKER, 3)
                    .owner(&KUBE, 4)
                    .netns(1)
                    .plan(["shutdown"])
                    .closed_by("shutdown")
                    .still_open(),
            ])
            .another_netns(4_026_532_001, Some("bl\x1bue"))
            .unreachable_namespaces(1, None),
        case("act-hostile-names", "--all").sockets([numbered(0)
            .owner(&EVIL, 3)
            .plan(["shutdown"])
            .closed_by("shutdown")
            .still_open()
            .owner(&NODE, 4)
            .still_open()]),
        case("act-all-closed", "--all").sockets(closed().into_iter().take(2)),
        case("act-all-gone", "--all").sockets([owned(0).gone(), owned(1).gone()]),
        case("act-five-owners", "--all").sockets([four()
            .owner(&FIFTH, 3)
            .plan(["shutdown"])
            .closed_by("shutdown")
            .no_longer_open()]),
        case("act-four-owners", "--all").sockets([four()
            .plan(["shutdown"])
            .closed_by("shutdown")
            .no_longer_open()]),
        case("act-skips", "--all --max-kills 3").sockets(one_each(&SKIPS, skipped)),
        case("act-spinning", "--all")
            .sockets([
                owned(0).closed_by("shutdown").still_open(),
                owned(1).skipped("owner-spins"),
                owned(2).skipped("owner-spins"),
            ])
            .spinning(&JAVA, None, false)
            .spinning(&NODE, Some(7), false)
            .spinning(&WORKER, None, false)
            .in_select()
            .spinning(&WORKER, Some(7), true),
        case("act-unread-bytes", "--all").sockets([
            owned(0).queues(8, 0).closed_by("shutdown").still_open(),
            owned(1).queues(1, 0).closed_by("shutdown").still_open(),
            numbered(2)
                .owner(&NODE, 7)
                .queues(8, 0)
                .closed_by("shutdown")
                .still_open(),
        ]),
        case("act-nothing-possible", "--all")
            .sockets([skipped(0, "no-method"), skipped(1, "no-method")]),
        case("act-failures", "--all").sockets(one_each(&ATTEMPTS, failing)),
        case("act-needs-ptrace", "--all")
            .sockets([failing(0, "denied-ptrace"), failing(1, "gone")]),
        case("act-unknown-owners", "--all")
            .sockets([numbered(0).plan(["destroy"]).closed_by("destroy")])
            .unreadable_processes(1),
        case("act-backlogs", "--all").sockets(backlog()),
        case("act-backlogs-no-owners", "--all --no-owners").sockets(backlog()),
        case("act-drained", "--all --drain-backlog")
            .sockets(backlog())
            .drained([
                Drained(&WEB, 3, 3, None),
                Drained(&MANY, 129, 128, None),
                Drained(&LAST, 1, 0, Some(DrainReason::LiveConnection(2))),
            ]),
        case("act-drained-nothing-matched", "--all --drain-backlog").drained([
            Drained(&WEB, 3, 1, Some(DrainReason::AcceptedElsewhere)),
            Drained(&NOBODYS, 1, 0, Some(DrainReason::NoOwner)),
            Drained(
                &MANY,
                129,
                7,
                Some(DrainReason::LostLiveConnection("10.0.0.9:5".into())),
            ),
        ]),
        case("dry-run-drained", "--all -n --drain-backlog").drained([
            Drained(&MANY, 129, 0, None),
            Drained(&WEB, 2, 0, Some(DrainReason::LiveConnection(1))),
        ]),
        case("act-no-owners", "--all --no-owners")
            .sockets([unowned(0).closed_by("destroy"), unowned(1).gone()]),
        case("act-no-owners-none-left", "--all --no-owners")
            .sockets([unowned(0).inode(0).closed_by("destroy"), unowned(1).gone()]),
        case("act-undecided", "--process java")
            .sockets([owned(0).closed_by("shutdown").no_longer_open()])
            .undecided(1),
        case("act-interrupted", "--all").sockets(interrupted),
        case("act-harsher-did-it", "--all").sockets([owned(0)
            .exclude("rst", "needs-net-raw")
            .attempt("shutdown", "denied-ptrace")
            .closed_by("destroy")
            .no_longer_open()]),
        case("quiet", "--all --quiet").sockets([owned(0).closed_by("shutdown"), owned(1).failed()]),
        done("watched-none", "--all --watch-refill 10s").watched(10_000, []),
        done("watched-none-blind", "--all --watch-refill 10s")
            .watched(999, [])
            .watched_without_seeing(2, true),
        done("watched-one", "--all --watch-refill 10s").watched(10_400, [(Some(&JAVA), 1)]),
        done("watched-unknown-owner", "--all --watch-refill 10s")
            .watched(600_000, [(None, 7)])
            .watched_without_seeing(1, false),
        done("watched-many", "--all --watch-refill 10s")
            .watched(
                10_000,
                [
                    (Some(&JAVA), 1000),
                    (None, 30),
                    (Some(&EVIL), 20),
                    (Some(&NODE), 10),
                    (Some(&NGINX), 1),
                ],
            )
            .watched_without_seeing(0, true),
        done("watched-three", "--all --watch-refill 10s")
            .watched(10_000, [(Some(&JAVA), 2), (Some(&NODE), 1), (None, 1)]),
        done("watched-at-once", "--all --watch-refill 10s").watched(0, [(Some(&JAVA), 1)]),
        done(
            "watched-other-states",
            "--all --state last-ack --watch-refill 10s",
        )
        .watched(10_000, [(Some(&JAVA), 2), (Some(&NODE), 1)]),
        case("watched-no-owners", "--all --no-owners --watch-refill 10s")
            .sockets([unowned(0).closed_by("destroy")])
            .watched(10_000, [(None, 5)]),
    ]
}

pub fn reclaims() -> Vec<Case> {
    let freed = |number| {
        owned(number)
            .closed_by("shutdown")
            .no_longer_open()
            .reclaim("freed")
    };
    let skipped = |number, why| {
        owned(number)
            .closed_by("shutdown")
            .still_open()
            .reclaim(leak("skipped", why))
    };
    let failed = |number, why| {
        owned(100 + number)
            .closed_by("shutdown")
            .still_open()
            .reclaim(leak("failed", why))
    };
    let mut all = one_each(&KEPT, skipped);
    all.extend(one_each(&KEPT[KEPT.len() - 4..], failed));
    all.extend([
        freed(200),
        freed(201).owner(&NODE, 5).reclaim("freed").no_longer_open(),
        owned(202)
            .closed_by("shutdown")
            .no_longer_open()
            .reclaim("gone"),
        freed(203)
            .owner(&NODE, 6)
            .still_open()
            .reclaim("skipped in-epoll")
            .owner(&NODE, 7)
            .still_open()
            .reclaim("skipped in-epoll"),
        owned(204).closing("shutdown", "last-ack").still_open(),
        numbered(205).plan(["destroy"]).closed_by("destroy"),
        owned(206)
            .attempt("shutdown", "os")
            .attempt("destroy", "os")
            .failed(),
        owned(207).closed_by("shutdown").reclaim("skipped denied"),
    ]);
    let act = |name, sockets: Vec<Matched>| case(name, "--all --reclaim").sockets(sockets);
    vec![
        act("reclaim", all)
            .stopped(&JAVA, 1_250, 3)
            .stopped(&NODE, 40, 1),
        act("reclaim-all-freed", vec![freed(0), freed(1)]).stopped(&JAVA, 99_960, 2),
        act("reclaim-one", vec![freed(0)]).stopped(&JAVA, 0, 1),
        act(
            "reclaim-gone",
            vec![
                owned(0)
                    .closed_by("shutdown")
                    .no_longer_open()
                    .reclaim("gone"),
            ],
        ),
        act("reclaim-skipped", vec![freed(0), skipped(1, "in-epoll")]).stopped(&JAVA, 500, 1),
        act("reclaim-failed", vec![freed(0), failed(1, "hangs")]).stopped(&JAVA, 500, 1),
        act("reclaim-denied", vec![skipped(0, "shared-unknown")]),
        act(
            "reclaim-nothing-closed",
            vec![owned(0).skipped("peer-alive"), owned(1).gone()],
        ),
        act(
            "reclaim-hostile-names",
            vec![
                numbered(0)
                    .owner(&EVIL, 3)
                    .plan(["shutdown"])
                    .closed_by("shutdown")
                    .still_open()
                    .reclaim("skipped hostile-tracer"),
            ],
        )
        .stopped(&EVIL, 77, 0),
        case("reclaim-dry-run-denied", "--all --reclaim -n").sockets([owned(0).reclaim("denied")]),
    ]
}

/// The words of an outcome with its reason, for as long as the tests run.
fn leak(outcome: &str, why: &str) -> &'static str {
    format!("{outcome} {why}").leak()
}

pub fn dead_cases() -> Vec<DeadCase> {
    let cookie = |number| u64::try_from(number).expect("a cookie");
    let at = |number: usize| {
        let number = i32::try_from(number).expect("a descriptor");
        dead(
            &JAVA,
            10 + number,
            70_000 + number.unsigned_abs(),
            cookie(i64::from(number)),
        )
    };
    let standard = || dead(&JAVA, 1, 70_001, 1);
    let some = || {
        [
            dead(&NODE, 3, 1, 1)
                .local(Some("[2001:db8::1]:443"))
                .quiet_ms(61),
            dead(&JAVA, 12, 2, u64::MAX)
                .local(None)
                .quiet_ms(90_000_000)
                .unread(1460),
            dead(&EVIL, 4, 3, 3),
        ]
    };
    let said = |dead: [Dead; 3], words: [&'static str; 3]| {
        dead.into_iter()
            .zip(words)
            .map(|(dead, words)| dead.said(words))
    };
    let judged = || one_each(&KEPT, |number, why| at(number).said(why));
    let mut outcomes = one_each(&KEPT, |number, why| at(number).said(leak("skipped", why)));
    outcomes.extend(one_each(&KEPT[KEPT.len() - 4..], |number, why| {
        at(100 + number).said(leak("failed", why))
    }));
    outcomes.extend([
        at(200).said("freed"),
        dead(&NODE, 3, 9, 9).said("gone"),
        dead(&NGINX, 4, 8, 8).said("freed"),
    ]);
    let freed =
        |name| dead_case(name, "--all").descriptors([at(0).said("freed"), at(1).said("gone")]);
    vec![
        dead_case("dead-listing", "").descriptors(said(some(), ["", "unread", "denied"])),
        dead_case("dead-listing-colored", "")
            .descriptors(said(some(), ["", "unread", ""]))
            .colored(),
        dead_case("dead-listing-no-header", "--no-header").descriptors([at(0)]),
        dead_case("dead-listing-places", "").descriptors([
            dead(&NGINX, 3, 1, 1),
            dead(&DOCKER, 4, 2, 2),
            dead(&KUBE, 5, 3, 3),
            at(0),
        ]),
        dead_case("dead-dry-run", "--all -n")
            .descriptors(judged())
            .descriptors(some()),
        dead_case("dead-many", "").descriptors((0..60).map(|number| {
            at(number).said(match number % 4 {
                0 => "unread",
                1 => "in-epoll",
                _ => "",
            })
        })),
        dead_case("dead-dry-run-one", "--all -n").descriptors([at(0)]),
        dead_case("dead-act", "--all")
            .descriptors(outcomes)
            .stopped(&JAVA, 1_250, 1)
            .stopped(&NGINX, 9, 1)
            .colored(),
        freed("dead-freed").stopped(&JAVA, 1_250, 1),
        freed("dead-freed-blind").unknown(1),
        dead_case("dead-replaced", "--all --reclaim-force")
            .descriptors([standard().said("replaced"), at(1).said("freed")])
            .stopped(&JAVA, 1_250, 1),
        dead_case("dead-dry-run-replaced", "--all -n --reclaim-force")
            .descriptors([standard(), at(1)]),
        dead_case("dead-skipped", "--all").descriptors([at(0).said("skipped in-epoll")]),
        dead_case("dead-failed", "--all").descriptors([at(0).said("failed os")]),
        dead_case("dead-denied", "--all").descriptors([at(0).said("skipped denied")]),
        dead_case("dead-hostile-names", "--all")
            .descriptors(said(some(), ["freed", "freed", "skipped hostile-tracer"]))
            .stopped(&EVIL, 5, 0),
        dead_case("dead-quiet", "--all --quiet").descriptors([at(0).said("freed")]),
        dead_case("dead-none", ""),
        dead_case("dead-none-to-free", "--all"),
        dead_case("dead-none-unknown", "").unknown(2),
        dead_case("dead-none-unreadable", "").unreadable_processes(1),
        dead_case("dead-none-leader-ended", "")
            .leader_ended(&EVIL)
            .leader_ended(&JAVA),
        dead_case("dead-none-failed", "").failed_process(31),
        dead_case("dead-none-hidden", "--all").hidden_processes(),
        dead_case("dead-listing-blind", "")
            .descriptors([at(0)])
            .unknown(1)
            .unreadable_processes(2)
            .leader_ended(&NODE)
            .failed_process(31)
            .failed_process(32)
            .hidden_processes(),
    ]
}
