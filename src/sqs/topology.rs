//! The queues that the settings name: whether they fit each other, and how missing ones are made.

use super::{CallError, Fault, Queue, QueueAttributes};
use aws_sdk_sqs::types::QueueAttributeName as Name;
use std::collections::HashMap;
use std::time::Duration;

/// Receipts after which SQS moves a message to the dead-letter queue by itself, for queues made here. AWS advises
/// "high enough to allow sufficient retries" (SQS Developer Guide, "Using dead-letter queues").
const MAX_RECEIVE_COUNT: u32 = 5;
/// The longest that SQS keeps a message (`SetQueueAttributes`, `MessageRetentionPeriod`).
const DEAD_LETTER_RETENTION: Duration = Duration::from_secs(14 * 86_400);

/// The queues of one program, as far as its settings name them.
#[derive(Clone, Debug)]
pub struct Queues {
    /// Where requests come from, and where refused ones go.
    pub requests: Option<(Queue, Queue)>,
    /// Where events go.
    pub events: Option<Queue>,
    /// For a queue of requests that is made.
    pub visibility: Duration,
}

/// What is wrong with queues.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Finding {
    /// Not there.
    #[error("is missing")]
    Missing,
    /// A refused message would be received again and again.
    #[error("is the dead-letter queue as well; name two queues")]
    SameQueue,
    /// SQS itself allows no such redrive policy.
    #[error("is a FIFO queue and its dead-letter queue is not, or the reverse; both have to be of one type")]
    TypesDiffer,
    /// A message that nobody can settle comes back until it is too old.
    #[error("has no redrive policy: give it one with maxReceiveCount 5 or more, to {0}")]
    NoRedrive(String),
    /// What SQS moves away by itself goes where nobody looks.
    #[error("has a redrive policy to {found}, not to {wanted}")]
    RedriveElsewhere {
        /// In the redrive policy.
        found: String,
        /// ARN of the dead-letter queue of the settings.
        wanted: String,
    },
    /// SQS takes messages away that were only given back a few times.
    #[error(
        "moves a message away after {0} receipts: give its redrive policy maxReceiveCount {MAX_RECEIVE_COUNT} or more"
    )]
    FewReceipts(u32),
    /// A message keeps its age when SQS moves it.
    #[error("keeps dead letters for a shorter time than the queue of requests keeps messages")]
    ShortRetention,
    /// A look is a receipt, and SQS moves away what was received often enough.
    #[error(
        "has a redrive policy of its own: each look at dead letters is a receipt, and SQS would move them away; remove it"
    )]
    DeadLettersMove,
}

impl Finding {
    /// Whether nothing can be received safely while it is so.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Missing | Self::SameQueue | Self::TypesDiffer)
    }

    /// What is wrong with a queue of requests, given its dead-letter queue.
    pub fn of_requests(requests: &QueueAttributes, dead_letters: &QueueAttributes) -> Vec<Self> {
        if requests.arn == dead_letters.arn {
            return vec![Self::SameQueue];
        }
        let types = (requests.is_fifo != dead_letters.is_fifo).then_some(Self::TypesDiffer);
        let wanted = dead_letters.arn.clone();
        let redrive = match &requests.dead_letter_arn {
            None => Some(Self::NoRedrive(wanted)),
            Some(found) if *found != wanted => Some(Self::RedriveElsewhere { found: found.clone(), wanted }),
            Some(_) => None,
        };
        let few = requests.max_receive_count.filter(|count| *count < MAX_RECEIVE_COUNT).map(Self::FewReceipts);
        types.into_iter().chain(redrive).chain(few).collect()
    }
}

impl Queues {
    /// Makes those that are missing; one that is there is left as it is. Tells which were made.
    pub async fn apply(&self) -> Result<Vec<String>, CallError> {
        let mut made = Vec::new();
        if let Some((requests, dead_letters)) = &self.requests {
            let retention = HashMap::from([(Name::MessageRetentionPeriod, seconds(DEAD_LETTER_RETENTION))]);
            made.extend(make(dead_letters, retention).await?);
            let policy = serde_json::json!({
                "deadLetterTargetArn": dead_letters.attributes().await?.arn,
                "maxReceiveCount": MAX_RECEIVE_COUNT,
            });
            let attributes = HashMap::from([
                (Name::RedrivePolicy, policy.to_string()),
                (Name::VisibilityTimeout, seconds(self.visibility)),
            ]);
            made.extend(make(requests, attributes).await?);
        }
        if let Some(events) = &self.events {
            made.extend(make(events, HashMap::new()).await?);
        }
        Ok(made)
    }

    /// All that is wrong, each with the queue's name.
    pub async fn check(&self) -> Result<Vec<(String, Finding)>, CallError> {
        let mut found = Vec::new();
        if let Some((requests, dead_letters)) = &self.requests {
            let mut attributes = [None, None];
            for (queue, place) in [requests, dead_letters].into_iter().zip(&mut attributes) {
                *place = look(queue).await?;
                if place.is_none() {
                    found.push((queue.name().to_owned(), Finding::Missing));
                }
            }
            if let [Some(of_requests), Some(of_dead)] = &attributes {
                let wrong = Finding::of_requests(of_requests, of_dead);
                found.extend(wrong.into_iter().map(|finding| (requests.name().to_owned(), finding)));
                if of_dead.retention < of_requests.retention {
                    found.push((dead_letters.name().to_owned(), Finding::ShortRetention));
                }
                if of_dead.dead_letter_arn.is_some() {
                    found.push((dead_letters.name().to_owned(), Finding::DeadLettersMove));
                }
            }
        }
        if let Some(events) = &self.events
            && look(events).await?.is_none()
        {
            found.push((events.name().to_owned(), Finding::Missing));
        }
        Ok(found)
    }
}

async fn look(queue: &Queue) -> Result<Option<QueueAttributes>, CallError> {
    match queue.attributes().await {
        Ok(attributes) => Ok(Some(attributes)),
        Err(error) if error.fault == Fault::Gone => Ok(None),
        Err(error) => Err(error),
    }
}

async fn make(queue: &Queue, mut attributes: HashMap<Name, String>) -> Result<Option<String>, CallError> {
    if look(queue).await?.is_some() {
        return Ok(None);
    }
    if queue.is_fifo() {
        attributes.insert(Name::FifoQueue, "true".to_owned());
    }
    queue.create(attributes).await?;
    Ok(Some(queue.name().to_owned()))
}

fn seconds(duration: Duration) -> String {
    duration.as_secs().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(arn: &str, is_fifo: bool, dead: Option<&str>) -> QueueAttributes {
        let dead_letter_arn = dead.map(str::to_owned);
        QueueAttributes { arn: arn.to_owned(), is_fifo, dead_letter_arn, ..QueueAttributes::default() }
    }

    #[test]
    fn queues_that_do_not_fit_are_told() {
        let dead = attributes("d", false, None);
        let of = |requests: &QueueAttributes, dead: &QueueAttributes| Finding::of_requests(requests, dead);
        assert_eq!(of(&attributes("r", false, Some("d")), &dead), []);
        assert_eq!(of(&attributes("d", false, Some("d")), &dead), [Finding::SameQueue]);
        assert_eq!(of(&attributes("r", false, None), &dead), [Finding::NoRedrive("d".into())]);
        let elsewhere = Finding::RedriveElsewhere { found: "x".into(), wanted: "d".into() };
        assert_eq!(of(&attributes("r", true, Some("x")), &dead), [Finding::TypesDiffer, elsewhere.clone()]);
        let few = QueueAttributes { max_receive_count: Some(4), ..attributes("r", false, Some("x")) };
        assert_eq!(of(&few, &dead), [elsewhere.clone(), Finding::FewReceipts(4)]);
        assert!(Finding::TypesDiffer.is_fatal() && !elsewhere.is_fatal());
    }
}
