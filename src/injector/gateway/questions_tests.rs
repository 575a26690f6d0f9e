use super::*;

const RETRY: Duration = Duration::from_millis(520);

fn tuple(local: &str, peer: &str) -> Tuple {
    Tuple {
        local: local.parse().unwrap(),
        peer: peer.parse().unwrap(),
    }
}

/// A client behind masquerading, and its server.
fn views() -> [Tuple; 2] {
    [
        tuple("10.9.1.2:40000", "10.9.2.2:7000"),
        tuple("10.9.2.2:7000", "10.9.2.1:1024"),
    ]
}

/// What an end does with the segments that it gets, as Linux does.
#[derive(Clone, Copy, Debug)]
struct Peer {
    /// The number that it expects next; `None`: it has no such connection.
    rcv_nxt: Option<u32>,
    /// It drops everything.
    is_deaf: bool,
    /// Its numbers move with each answer: data arrives all the time.
    moves: bool,
    /// No RST arrives at it.
    is_shielded: bool,
    last_answer: Option<Instant>,
}

const LIVING: Peer = Peer {
    rcv_nxt: Some(5_000),
    is_deaf: false,
    moves: false,
    is_shielded: false,
    last_answer: None,
};
const FORGETFUL: Peer = Peer {
    rcv_nxt: None,
    ..LIVING
};
const SHIELDED: Peer = Peer {
    is_shielded: true,
    ..LIVING
};
const DEAF: Peer = Peer {
    is_deaf: true,
    ..LIVING
};
const BUSY: Peer = Peer {
    moves: true,
    ..LIVING
};

impl Peer {
    fn get(&mut self, segment: &Segment, now: Instant) -> Option<Segment> {
        let answer = |seq, ack, flags| Segment {
            from: segment.to,
            to: segment.from,
            seq,
            ack,
            flags,
            payload_len: 0,
        };
        let Some(rcv_nxt) = self.rcv_nxt.filter(|_| !self.is_deaf) else {
            let is_question = segment.flags == TcpFlags::ACK && !self.is_deaf;
            return is_question.then(|| answer(segment.ack, Seq(0), TcpFlags::RST));
        };
        if segment.flags == TcpFlags::RST {
            if segment.seq == Seq(rcv_nxt) && !self.is_shielded {
                self.rcv_nxt = None;
            }
            return None;
        }
        let may = self
            .last_answer
            .is_none_or(|last| now - last >= Duration::from_millis(500));
        if !may {
            return None;
        }
        self.last_answer = Some(now);
        let told = answer(Seq(77), Seq(rcv_nxt), TcpFlags::ACK);
        if self.moves {
            self.rcv_nxt = Some(rcv_nxt + 1448);
        }
        Some(told)
    }
}

/// Lets cwkill talk to two ends until nothing is due. Returns their reports, the time that it took, and the ends afterwards.
fn talk(act: ForwardedAct, mut peers: [Peer; 2]) -> ([EndReport; 2], Duration, [Peer; 2]) {
    let start = Instant::now();
    let mut now = start;
    let mut questions = Questions::new(act, &[views()], RETRY, now);
    let mut number = 1;
    while let Some(next) = questions.next_due() {
        now = now.max(next);
        for index in questions.due(now) {
            number += 2;
            let asked = questions.ask(index, Seq(number << 8), Seq(number), now);
            let mut on_their_way: Vec<(usize, Segment)> =
                asked.map(|it| (index, it)).into_iter().collect();
            while !on_their_way.is_empty() {
                let (index, segment) = on_their_way.remove(0);
                assert_eq!(segment.to, views()[index].local);
                if let Some(answer) = peers[index].get(&segment, now) {
                    // What an end sends goes on to the other one, which answers the RST of nobody.
                    if let Some(numbers) = peers[index].rcv_nxt
                        && peers[index ^ 1].rcv_nxt.is_none()
                        && !peers[index ^ 1].is_deaf
                        && answer.flags == TcpFlags::ACK
                        && act == ForwardedAct::Probe
                    {
                        let healing = Segment {
                            seq: Seq(numbers),
                            flags: TcpFlags::RST,
                            ..segment
                        };
                        peers[index].get(&healing, now);
                    }
                    number += 2;
                    let more = questions.note(&answer, Seq(number << 8), Seq(number), now);
                    for (index, segment) in &more {
                        if segment.flags == TcpFlags::RST {
                            questions.reset_sent(*index);
                        }
                    }
                    on_their_way.extend(more);
                }
            }
        }
        assert!(now - start < Duration::from_secs(60), "it does not end");
    }
    (questions.reports(0), now - start, peers)
}

#[test]
fn a_cut_resets_both_ends_and_sees_that_they_are_gone() {
    let (reports, took, peers) = talk(ForwardedAct::Cut, [LIVING, LIVING]);
    for (report, peer) in reports.iter().zip(peers) {
        let expected = EndReport {
            first: EndState::Alive,
            now: EndState::Gone,
            resets: 1,
        };
        assert_eq!((*report, peer.rcv_nxt), (expected, None));
    }
    assert_eq!(took, Duration::ZERO, "one round trip");
}

#[test]
fn an_end_that_has_forgotten_is_not_reset() {
    let (reports, _, peers) = talk(ForwardedAct::Cut, [FORGETFUL, LIVING]);
    assert_eq!((reports[0].first, reports[0].resets), (EndState::Gone, 0));
    assert_eq!((reports[1].now, reports[1].resets), (EndState::Gone, 1));
    assert_eq!(peers[1].rcv_nxt, None);
}

#[test]
fn a_silent_end_is_asked_twice_and_gets_nothing() {
    let (reports, took, _) = talk(ForwardedAct::Cut, [DEAF, LIVING]);
    assert_eq!((reports[0].now, reports[0].resets), (EndState::Silent, 0));
    assert_eq!(reports[1].now, EndState::Gone);
    assert_eq!(took, RETRY * 2);
}

#[test]
fn numbers_that_move_get_three_resets_at_most() {
    let (reports, took, peers) = talk(ForwardedAct::Cut, [BUSY, LIVING]);
    assert_eq!((reports[0].now, reports[0].resets), (EndState::Alive, 3));
    assert!(peers[0].rcv_nxt.is_some());
    assert_eq!(took, RETRY * 3);
}

#[test]
fn a_probe_leaves_living_ends_alone() {
    let (reports, took, peers) = talk(ForwardedAct::Probe, [LIVING, LIVING]);
    for (report, peer) in reports.iter().zip(peers) {
        assert_eq!((report.now, report.resets), (EndState::Alive, 0));
        assert_eq!(peer.rcv_nxt, LIVING.rcv_nxt);
    }
    assert_eq!(took, Duration::ZERO);
    let (reports, _, peers) = talk(ForwardedAct::Probe, [DEAF, LIVING]);
    assert_eq!(
        (reports[0].now, reports[1].now),
        (EndState::Silent, EndState::Alive)
    );
    assert_eq!(peers[1].rcv_nxt, LIVING.rcv_nxt);
}

/// Its own answer goes to the end that has forgotten, whose RST heals it.
#[test]
fn a_probe_heals_without_a_forged_reset() {
    for peers in [[FORGETFUL, LIVING], [LIVING, FORGETFUL]] {
        let living = usize::from(peers[0].rcv_nxt.is_none());
        let (reports, took, peers) = talk(ForwardedAct::Probe, peers);
        assert_eq!(
            (reports[living].first, reports[living].now),
            (EndState::Alive, EndState::Gone)
        );
        assert_eq!((reports[living].resets, peers[living].rcv_nxt), (0, None));
        assert_eq!(took, Duration::ZERO);
    }
}

/// Something else may have answered RST, so what is still alive gets none from here.
#[test]
fn a_probe_never_sends_a_reset() {
    for peers in [[FORGETFUL, SHIELDED], [SHIELDED, FORGETFUL]] {
        let living = usize::from(peers[0].rcv_nxt.is_none());
        let (reports, took, peers) = talk(ForwardedAct::Probe, peers);
        let expected = EndReport {
            first: EndState::Alive,
            now: EndState::Alive,
            resets: 0,
        };
        assert_eq!((reports[living], took), (expected, RETRY));
        assert_eq!(reports[1 - living].now, EndState::Gone);
        assert_eq!(peers[living].rcv_nxt, LIVING.rcv_nxt);
    }
}

#[test]
fn foreign_segments_are_not_answers() {
    let now = Instant::now();
    let mut questions = Questions::new(ForwardedAct::Cut, &[views()], RETRY, now);
    let asked = questions.ask(0, Seq(1), Seq(9), now).unwrap();
    let from_end = |seq, flags| Segment {
        from: asked.to,
        to: asked.from,
        seq: Seq(seq),
        ack: Seq(3),
        flags,
        payload_len: 0,
    };
    for other in [
        // An RST of the end for another reason, or forged by somebody who does not know the number.
        from_end(8, TcpFlags::RST),
        from_end(9, TcpFlags::RST | TcpFlags::ACK),
        from_end(1, TcpFlags::FIN | TcpFlags::ACK),
        // The other direction.
        asked,
        Segment {
            from: "10.9.1.3:40000".parse().unwrap(),
            ..from_end(1, TcpFlags::ACK)
        },
    ] {
        assert_eq!(questions.note(&other, Seq(1), Seq(2), now), [], "{other:?}");
    }
    assert_eq!(questions.reports(0)[0], EndReport::default());
    let sent = questions.note(&from_end(1, TcpFlags::ACK), Seq(1), Seq(2), now);
    assert_eq!((sent[0].1.flags, sent[0].1.seq), (TcpFlags::RST, Seq(3)));
    // An ACK that was on its way says nothing about the RST.
    assert_eq!(
        questions.note(&from_end(1, TcpFlags::ACK), Seq(1), Seq(2), now),
        []
    );
    // The answer to the second question, twice.
    for _ in 0..2 {
        assert_eq!(
            questions.note(&from_end(2, TcpFlags::RST), Seq(1), Seq(2), now),
            []
        );
    }
    assert_eq!(questions.reports(0)[0].now, EndState::Gone);
}

/// A new connection of the same ends answers like the old one. Its SYN has passed before.
#[test]
fn after_a_syn_nothing_is_sent_any_more() {
    for (side, flags) in [
        (0, TcpFlags::SYN),
        (1, TcpFlags::SYN | TcpFlags::ACK),
        (1, TcpFlags::SYN),
    ] {
        let now = Instant::now();
        let mut questions = Questions::new(ForwardedAct::Cut, &[views()], RETRY, now);
        for index in [0, 1] {
            questions.ask(index, Seq(1), Seq(9), now).unwrap();
        }
        let from = |side: usize, flags| Segment {
            from: views()[side].local,
            to: views()[side].peer,
            seq: Seq(1),
            ack: Seq(3),
            flags,
            payload_len: 0,
        };
        assert!(!questions.has_ended(0));
        questions.note_syn(&from(side, flags));
        assert!(questions.has_ended(0));
        // A loss afterwards changes nothing: it is not asked anew.
        questions.note_loss(now);
        assert!(questions.has_ended(0) && !questions.is_lost(0));
        for side in [0, 1] {
            let sent = questions.note(&from(side, TcpFlags::ACK), Seq(1), Seq(2), now);
            assert_eq!(sent, [], "{side}");
        }
        assert_eq!(questions.next_due(), None);
    }
}

fn answer(side: usize, ack: u32) -> Segment {
    Segment {
        from: views()[side].local,
        to: views()[side].peer,
        seq: Seq(1),
        ack: Seq(ack),
        flags: TcpFlags::ACK,
        payload_len: 0,
    }
}

/// Two connections, of which the source of the first was reset.
fn one_reset(now: Instant) -> Questions {
    let second = [
        tuple("10.9.1.3:40000", "10.9.2.2:7000"),
        tuple("10.9.2.2:7000", "10.9.2.1:1025"),
    ];
    let mut questions = Questions::new(ForwardedAct::Cut, &[views(), second], RETRY, now);
    for index in 0..4 {
        questions.ask(index, Seq(1), Seq(9), now).unwrap();
    }
    let sent = questions.note(&answer(0, 3), Seq(1), Seq(2), now);
    assert_eq!(sent.len(), 2);
    questions.reset_sent(0);
    questions
}

#[test]
fn what_was_reset_is_verified_also_after_an_interrupt() {
    let now = Instant::now();
    let mut questions = one_reset(now);
    questions.cancel();
    assert_eq!([0, 1].map(|it| questions.is_cancelled(it)), [false, true]);
    // The other end is reset too: half a connection is worse than none.
    let sent = questions.note(&answer(1, 3), Seq(1), Seq(2), now);
    assert_eq!(sent[0].1.flags, TcpFlags::RST);
    let later = now + RETRY;
    assert_eq!(questions.due(later), [0, 1]);
}

/// A SYN may have been among the lost segments, so an answer may be of a new connection.
#[test]
fn after_a_loss_nothing_is_reset_and_silence_does_not_count() {
    let now = Instant::now();
    let mut questions = one_reset(now);
    questions.note_loss(now);
    assert_eq!([0, 1].map(|it| questions.is_lost(it)), [false, true]);
    assert!(!questions.may_reset(0) && !questions.may_reset(1));
    assert!(!questions.may_delete(0) && !questions.may_delete(1));
    // Both ends of the first are asked twice more, but not at once; those of the second no more.
    assert!(questions.due(now).is_empty());
    for round in 1..=MAX_SILENCES {
        let now = now + u32::from(round) * RETRY;
        assert_eq!(questions.due(now), [0, 1]);
        for index in [0, 1] {
            assert!(questions.ask(index, Seq(1), Seq(2), now).is_some());
        }
    }
    assert_eq!(questions.note(&answer(1, 3), Seq(1), Seq(2), now), []);
    let alive = EndReport {
        first: EndState::Alive,
        now: EndState::Alive,
        resets: 0,
    };
    assert_eq!(questions.reports(0)[1], alive);
}

#[test]
fn after_three_losses_a_verification_is_given_up() {
    let mut now = Instant::now();
    let mut questions = one_reset(now);
    for count in 1..=MAX_LOSSES {
        assert!(!questions.is_lost(0), "{count}");
        // More losses before the next question spoil nothing.
        for _ in 0..5 {
            questions.note_loss(now);
        }
        now += RETRY;
        for index in questions.due(now) {
            assert!(questions.ask(index, Seq(1), Seq(2), now).is_some());
        }
    }
    assert!(questions.is_lost(0));
    assert_eq!(questions.next_due(), None);
}

#[test]
fn a_loss_takes_back_nothing_that_is_known() {
    let now = Instant::now();
    let mut questions = Questions::new(ForwardedAct::Probe, &[views()], RETRY, now);
    for side in [0, 1] {
        questions.ask(side, Seq(1), Seq(9), now).unwrap();
        assert_eq!(questions.note(&answer(side, 3), Seq(1), Seq(2), now), []);
    }
    assert!(questions.may_delete(0));
    questions.note_loss(now);
    questions.give_up();
    assert!(!questions.is_lost(0) && !questions.may_delete(0));
    let states = questions.reports(0).map(|report| report.now);
    assert_eq!(states, [EndState::Alive; 2]);
    // What the operator did not want to wait for stays cancelled.
    let mut questions = Questions::new(ForwardedAct::Cut, &[views()], RETRY, now);
    questions.cancel();
    questions.note_loss(now);
    assert!(questions.is_cancelled(0) && !questions.is_lost(0));
}

/// The capture has failed.
#[test]
fn without_a_capture_nothing_more_is_asked() {
    let mut questions = one_reset(Instant::now());
    questions.give_up();
    assert_eq!([0, 1].map(|it| questions.is_lost(it)), [true; 2]);
    assert_eq!(questions.next_due(), None);
}
