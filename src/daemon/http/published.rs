//! What the server answers with: the metrics of the last sweep, and whether it is recent. A request changes nothing, and looks at nothing
//! else.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::message::{Answer, Request, Status};
use crate::daemon::metrics::CONTENT_TYPE;
use crate::text::age;

/// The last sweep may be this many times as long ago as an interval or a sweep takes.
const MAX_TIMES: u32 = 3;

/// The result of the last sweep, for the threads that serve it.
#[derive(Debug, Default)]
pub struct Published(Mutex<Last>);

#[derive(Clone, Debug, Default)]
struct Last {
    metrics: Option<Arc<[u8]>>,
    /// When the last sweep ended that did not fail, as a time since boot.
    succeeded: Option<Duration>,
    interval: Duration,
    took: Duration,
}

impl Published {
    /// Takes over the metrics. `succeeded`: when the last sweep ended that did not fail, as a time since boot; `took`: how long it took.
    pub fn set(
        &self,
        metrics: Option<String>,
        succeeded: Option<Duration>,
        interval: Duration,
        took: Duration,
    ) {
        let last = Last {
            metrics: metrics.map(|text| text.into_bytes().into()),
            succeeded,
            interval,
            took,
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = last;
    }

    /// `now`: the time since boot.
    pub fn answer(&self, request: &Request, now: Duration) -> Answer {
        let last = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let line = |status, line: &str| Answer::line(status, line, request.is_head);
        match (request.path.as_str(), last.metrics.clone()) {
            ("/metrics", Some(metrics)) => {
                Answer::new(Status::Ok, CONTENT_TYPE, metrics, request.is_head)
            }
            ("/metrics", None) => line(Status::ServiceUnavailable, NO_SWEEP),
            ("/healthz", _) => {
                let (status, text) = last.health(now);
                line(status, &text)
            }
            _ => line(Status::NotFound, "there are /metrics and /healthz"),
        }
    }
}

const NO_SWEEP: &str = "no sweep has ended yet";

impl Last {
    fn health(&self, now: Duration) -> (Status, String) {
        let Some(succeeded) = self.succeeded else {
            return (Status::ServiceUnavailable, NO_SWEEP.to_owned());
        };
        let ago = now.saturating_sub(succeeded);
        let text = format!("the last sweep that succeeded ended {} ago", age(ago));
        // A sweep that takes longer than the interval is followed by the next at once.
        let (usual, what) = match self.interval >= self.took {
            true => (self.interval, "intervals"),
            false => (self.took, "sweeps"),
        };
        match ago <= usual.saturating_mul(MAX_TIMES) {
            true => (Status::Ok, text),
            false => {
                let text = format!("{text}, more than {MAX_TIMES} {what} of {}", age(usual));
                (Status::ServiceUnavailable, text)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(published: &Published, path: &str, now: u64) -> String {
        let request = Request {
            is_head: false,
            path: path.to_owned(),
        };
        let answer = published.answer(&request, Duration::from_secs(now));
        let head = answer.rest(0).to_vec();
        let body = answer.rest(head.len());
        let text = String::from_utf8([&head, body].concat()).unwrap();
        let status = text.split(' ').nth(1).unwrap();
        let body = text.split_once("\r\n\r\n").unwrap().1;
        format!("{status} {}", body.trim_end())
    }

    #[test]
    fn before_the_first_sweep_nothing_is_claimed() {
        let published = Published::default();
        assert_eq!(get(&published, "/metrics", 5), "503 no sweep has ended yet");
        assert_eq!(get(&published, "/healthz", 5), "503 no sweep has ended yet");
    }

    #[test]
    fn an_old_sweep_is_unhealthy_and_still_served() {
        let published = Published::default();
        let seconds = Duration::from_secs;
        let set = |took| {
            let text = Some("x 1\n".to_owned());
            published.set(text, Some(seconds(100)), seconds(30), seconds(took));
        };
        set(1);
        let ago = "the last sweep that succeeded ended";
        assert_eq!(
            get(&published, "/healthz", 190),
            format!("200 {ago} 1m30s ago")
        );
        assert_eq!(
            get(&published, "/healthz", 191),
            format!("503 {ago} 1m31s ago, more than 3 intervals of 30s")
        );
        assert_eq!(get(&published, "/metrics", 9999), "200 x 1");
        assert_eq!(
            get(&published, "/", 100),
            "404 there are /metrics and /healthz"
        );
        // A clock of another time namespace does not make it negative.
        assert_eq!(get(&published, "/healthz", 0), format!("200 {ago} 0ms ago"));
        // Sweeps that take longer than their interval.
        set(100);
        assert_eq!(
            get(&published, "/healthz", 400),
            format!("200 {ago} 5m00s ago")
        );
        assert_eq!(
            get(&published, "/healthz", 401),
            format!("503 {ago} 5m01s ago, more than 3 sweeps of 1m40s")
        );
    }
}
