//! Benchmarks of the parts whose cost grows with the number of sockets and descriptors: `cargo bench`.
//!
//! `netns-harness bench` compares the cost of the whole program with other programs.

use std::hint::black_box;
use std::os::unix::fs::symlink;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use cwkill::filter::{self, Services, SocketFacts};
use cwkill::finder::owners;
use cwkill::model::Socket;
use cwkill::proc::ProcFs;
use cwkill::sock_diag::codec::{Frame, Protocol, frames};

const DUMP: &str = include_str!("../src/sock_diag/testdata/dump-v6.hex");

fn dump() -> Vec<u8> {
    let digits: String = DUMP.split_whitespace().collect();
    (0..digits.len())
        .step_by(2)
        .map(|start| u8::from_str_radix(&digits[start..start + 2], 16).expect("hex"))
        .collect()
}

fn sockets(datagram: &[u8]) -> Vec<Socket> {
    frames(datagram, Protocol::Tcp)
        .filter_map(|framed| match framed.ok()?.frame {
            Frame::Socket(message) => Some(Socket::from_message(&message)),
            _ => None,
        })
        .collect()
}

fn codec(c: &mut Criterion) {
    let datagram = dump();
    let mut group = c.benchmark_group("codec");
    let count = sockets(&datagram).len();
    group.throughput(Throughput::Elements(u64::try_from(count).expect("small")));
    group.bench_function("a real dump with TCP_INFO", |b| {
        b.iter(|| sockets(black_box(&datagram)));
    });
    group.finish();
}

fn find_owners(c: &mut Criterion) {
    const DESCRIPTORS: u32 = 10_000;
    let root = tempfile::tempdir().expect("a temporary directory");
    let fds = root.path().join("1/fd");
    std::fs::create_dir_all(&fds).expect("a process");
    let stat = format!("1 (p) S 0 {}", "0 ".repeat(60));
    std::fs::write(root.path().join("1/stat"), stat).expect("its stat");
    for fd in 0..DESCRIPTORS {
        symlink(format!("socket:[{}]", fd + 1000), fds.join(fd.to_string())).expect("a descriptor");
    }
    let inodes = (1000..1000 + DESCRIPTORS).collect();
    let proc = ProcFs::at(root.path());
    let mut group = c.benchmark_group("owners");
    group.throughput(Throughput::Elements(DESCRIPTORS.into()));
    group.sample_size(20);
    group.bench_function(
        "one process, on the file system of the temporary directory",
        |b| {
            b.iter(|| owners::find(&proc, &inodes).expect("a scan"));
        },
    );
    group.finish();
}

fn expressions(c: &mut Criterion) {
    let text = "( sport = :8080 or sport = :8443 ) and dst 10.0.0.0/8 and not dst 10.1.0.0/16";
    let services = Services::from_text("");
    c.bench_function("expression: parse", |b| {
        b.iter(|| filter::parse(black_box(text), &services).expect("valid"));
    });
    let parsed = filter::parse(text, &services).expect("valid").expression;
    let datagram = dump();
    let facts: Vec<SocketFacts> = sockets(&datagram).iter().map(SocketFacts::from).collect();
    c.bench_function("expression: match four sockets", |b| {
        b.iter(|| {
            facts
                .iter()
                .filter(|facts| parsed.matches(black_box(facts)))
                .count()
        });
    });
}

criterion_group!(benches, codec, find_owners, expressions);
criterion_main!(benches);
