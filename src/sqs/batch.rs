//! Many messages, in batches as SQS takes them, each entry tried again with a bound.

use super::queue::Entries;
use super::{CallError, EntryError, Fault, Outgoing, Queue};
use crate::retry::{Attempts, Class};
use futures_util::StreamExt as _;
use futures_util::stream;
use std::collections::HashSet;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

/// Entries of a batch at most (SQS Developer Guide, "Amazon SQS batch actions").
const MOST_ENTRIES: usize = 10;
/// Bytes of a batch of messages at most, attributes counted. SQS takes 1 MiB since 2025, but a queue can be set to less,
/// and this was the limit for ever before. A single larger message is left to SQS to judge.
const MOST_BYTES: usize = 256 * 1024;
/// Batches under way at most.
const CONCURRENT: usize = 8;

/// A receipt, and for how long from now its message stays hidden; zero makes it visible at once.
pub type Visibility<'a> = (&'a str, Duration);

/// What is to be done with many messages.
#[derive(Clone, Copy, Debug)]
pub enum Batch<'a> {
    /// Messages to be sent.
    Send(&'a [Outgoing]),
    /// Receipts of messages to be deleted.
    Delete(&'a [&'a str]),
    /// Receipts of messages that stay hidden for so long.
    Visibility(&'a [Visibility<'a>]),
}

/// What became of one message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// SQS did it.
    Done,
    /// SQS will not do it, however often it is asked.
    Refused(EntryError),
    /// Not done, as far as is known, after all attempts; the last of these ended so.
    Undone(String),
    /// Not tried: an earlier message of its group was not sent.
    Behind,
    /// The call as a whole failed, for a reason that concerns all messages.
    Failed(CallError),
    /// Not tried, or not once more: there was no time left for it.
    Late,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Refused(error) => write!(f, "SQS refuses: {error}"),
            Self::Undone(text) => write!(f, "after all attempts: {text}"),
            Self::Behind => f.write_str("not tried: an earlier message of its group was not sent"),
            Self::Failed(error) => error.fmt(f),
            Self::Late => f.write_str("there was no time left for it"),
        }
    }
}

impl Batch<'_> {
    fn len(self) -> usize {
        match self {
            Self::Send(messages) => messages.len(),
            Self::Delete(receipts) => receipts.len(),
            Self::Visibility(changes) => changes.len(),
        }
    }

    fn size(self, at: usize) -> usize {
        match self {
            Self::Send(messages) => messages[at].size(),
            // Far below any limit.
            Self::Delete(_) | Self::Visibility(_) => 0,
        }
    }

    fn group(&self, at: usize) -> Option<&str> {
        match self {
            Self::Send(messages) => messages[at].order.as_ref().map(|order| order.group.as_str()),
            Self::Delete(_) | Self::Visibility(_) => None,
        }
    }

    async fn call(self, queue: &Queue, chosen: &[usize]) -> Result<Entries, CallError> {
        match self {
            Self::Send(messages) => queue.send(&chosen.iter().map(|at| &messages[*at]).collect::<Vec<_>>()).await,
            Self::Delete(receipts) => queue.delete(&chosen.iter().map(|at| receipts[*at]).collect::<Vec<_>>()).await,
            Self::Visibility(changes) => {
                queue.change_visibility(&chosen.iter().map(|at| changes[*at]).collect::<Vec<_>>()).await
            }
        }
    }

    /// Batches of what is left, in order, as full as the limits allow.
    fn full(self) -> Vec<Vec<usize>> {
        let mut batches = Vec::new();
        let mut rest: Vec<usize> = (0..self.len()).collect();
        while !rest.is_empty() {
            batches.push(self.take(&mut rest));
        }
        batches
    }

    /// Takes a batch out of `rest`: in order, no two of a group, so that none can pass an earlier one of its group
    /// that fails in the same call.
    fn take(self, rest: &mut Vec<usize>) -> Vec<usize> {
        let (mut chosen, mut bytes, mut groups) = (Vec::new(), 0, HashSet::new());
        rest.retain(|at| {
            let size = self.size(*at);
            let fits = chosen.is_empty() || (chosen.len() < MOST_ENTRIES && bytes + size <= MOST_BYTES);
            // One that does not fit keeps those behind it in its group back as well.
            let is_first = self.group(*at).is_none_or(|group| groups.insert(group.to_owned()));
            let is_chosen = fits && is_first;
            if is_chosen {
                bytes += size;
                chosen.push(*at);
            }
            !is_chosen
        });
        chosen
    }
}

impl Queue {
    /// Does it all, with up to `attempts` calls for each message, and tells of each in order. Batches run beside each
    /// other; on a FIFO queue messages go out one batch after the other, and none past an earlier one of its group
    /// that was not sent.
    pub async fn carry_out(&self, work: Batch<'_>, attempts: u32) -> Vec<Outcome> {
        self.work_off(work, attempts, None).await
    }

    /// The same, but no call begins after `until`. One that is under way then is awaited, as its own timeout allows:
    /// what was done is known, and is not done again.
    pub async fn carry_out_until(&self, work: Batch<'_>, attempts: u32, until: Instant) -> Vec<Outcome> {
        self.work_off(work, attempts, Some(until)).await
    }

    async fn work_off(&self, work: Batch<'_>, attempts: u32, until: Option<Instant>) -> Vec<Outcome> {
        let mut outcomes = vec![Outcome::Late; work.len()];
        if matches!(work, Batch::Send(_)) && self.is_fifo() {
            let mut rest: Vec<usize> = (0..work.len()).collect();
            while !rest.is_empty() && !is_over(until) {
                let batch = work.take(&mut rest);
                for (at, outcome) in self.carry_out_one(work, batch, attempts, until).await {
                    let behind = match &outcome {
                        Outcome::Done => None,
                        Outcome::Failed(_) | Outcome::Late => Some(outcome.clone()),
                        _ => Some(Outcome::Behind),
                    };
                    if let Some(behind) = behind {
                        let concerns_all = matches!(outcome, Outcome::Failed(_));
                        rest.retain(|later| {
                            let is_behind = concerns_all || work.group(*later) == work.group(at);
                            if is_behind {
                                outcomes[*later] = behind.clone();
                            }
                            !is_behind
                        });
                    }
                    outcomes[at] = outcome;
                }
            }
            return outcomes;
        }
        let batches = work.full().into_iter().map(|batch| self.carry_out_one(work, batch, attempts, until));
        let mut running = stream::iter(batches).buffer_unordered(CONCURRENT);
        while let Some(told) = running.next().await {
            for (at, outcome) in told {
                outcomes[at] = outcome;
            }
        }
        outcomes
    }

    /// One batch, and what it leaves undone again.
    async fn carry_out_one(
        &self,
        work: Batch<'_>,
        batch: Vec<usize>,
        attempts: u32,
        until: Option<Instant>,
    ) -> Vec<(usize, Outcome)> {
        let mut told = Vec::with_capacity(batch.len());
        let mut open = vec![batch];
        while let Some(mut left) = open.pop() {
            let mut made = 0;
            let (mut transient, mut throttled) = (Attempts::new(Class::Transient), Attempts::new(Class::Throttled));
            while !left.is_empty() {
                if is_over(until) {
                    told.extend(left.drain(..).map(|at| (at, Outcome::Late)));
                    continue;
                }
                made += 1;
                let is_last = made >= attempts;
                let delay = match work.call(self, &left).await {
                    Ok(entries) => {
                        left = sort_out(&left, entries, is_last, &mut told);
                        transient.next_delay()
                    }
                    // Which of them breaks the rule shows when each is alone.
                    Err(error) if error.fault == Fault::Refused && left.len() > 1 => {
                        open.extend(left.drain(..).map(|at| vec![at]));
                        continue;
                    }
                    Err(error) if error.fault == Fault::Refused => {
                        let CallError { code, message, .. } = error;
                        let code = code.unwrap_or_else(|| Fault::Refused.as_str().to_owned());
                        let error = EntryError { is_senders_fault: true, code, message };
                        told.extend(left.drain(..).map(|at| (at, Outcome::Refused(error.clone()))));
                        continue;
                    }
                    Err(error) if is_last || matches!(error.fault, Fault::Gone | Fault::Denied) => {
                        told.extend(left.drain(..).map(|at| (at, Outcome::Failed(error.clone()))));
                        continue;
                    }
                    Err(error) if error.fault == Fault::Throttled => throttled.next_delay(),
                    Err(_) => transient.next_delay(),
                };
                if !left.is_empty() {
                    let wake = Instant::now() + delay;
                    tokio::time::sleep_until(until.map_or(wake, |until| wake.min(until))).await;
                }
            }
        }
        told
    }
}

fn is_over(until: Option<Instant>) -> bool {
    until.is_some_and(|until| Instant::now() >= until)
}

/// What another attempt can do something for.
fn sort_out(batch: &[usize], entries: Entries, is_last: bool, told: &mut Vec<(usize, Outcome)>) -> Vec<usize> {
    let mut left = Vec::new();
    for (at, entry) in batch.iter().zip(entries) {
        let outcome = match entry {
            Ok(()) => Outcome::Done,
            Err(error) if !error.is_worth_another() => Outcome::Refused(error),
            Err(error) if is_last => Outcome::Undone(error.to_string()),
            Err(_) => {
                left.push(*at);
                continue;
            }
        };
        told.push((*at, outcome));
    }
    left
}

#[cfg(test)]
mod tests {
    use super::super::{Attribute, Order};
    use super::*;

    fn message(bytes: usize, group: Option<&str>) -> Outgoing {
        let order = group.map(|group| Order { group: group.to_owned(), deduplication: "d".to_owned() });
        Outgoing { body: "x".repeat(bytes), attributes: Vec::new(), order }
    }

    #[test]
    fn a_batch_has_ten_entries_and_so_many_bytes_at_most() {
        let small: Vec<Outgoing> = (0..25).map(|_| message(1, None)).collect();
        let lengths =
            |messages: &[Outgoing]| -> Vec<usize> { Batch::Send(messages).full().iter().map(Vec::len).collect() };
        assert_eq!(lengths(&small), [10, 10, 5]);
        // Four of 64 KiB fill it exactly; an attribute is counted.
        let mut large: Vec<Outgoing> = (0..4).map(|_| message(MOST_BYTES / 4, None)).collect();
        assert_eq!(lengths(&large), [4]);
        large[3].attributes.push(Attribute::text("a", "b"));
        assert_eq!(lengths(&large), [3, 1]);
        // What no batch can hold goes alone, and SQS judges it.
        assert_eq!(lengths(&[message(MOST_BYTES + 1, None), message(1, None)]), [1, 1]);
        assert_eq!(Batch::Delete(&[]).full(), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn a_batch_has_one_message_of_a_group() {
        let messages = [message(1, Some("a")), message(1, Some("a")), message(1, Some("b")), message(1, Some("a"))];
        assert_eq!(Batch::Send(&messages).full(), [vec![0, 2], vec![1], vec![3]]);
        // One that does not fit is not passed by a smaller one of its group.
        let messages = [message(1, Some("x")), message(MOST_BYTES, Some("a")), message(1, Some("a"))];
        assert_eq!(Batch::Send(&messages).full(), [vec![0], vec![1], vec![2]]);
    }
}
