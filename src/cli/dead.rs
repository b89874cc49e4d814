//! `keyferry dead`.

use super::jobs::progress_bar;
use super::output::{Output, duration};
use super::sender::SignArgs;
use super::submit::transport;
use super::{Coded, Failed};
use crate::app::{open_broker, open_keyring, open_store};
use crate::config::{Loaded, Transport};
use crate::dead::known::{Known, Matcher, Standing};
use crate::dead::mask::{masked, masked_text, whole};
use crate::dead::{Census, Chosen, DeadLetters, Sent, Session, Stamp, rabbitmq, sqs};
use crate::ingress::Sender as Word;
use crate::job::{RefusalCode, rfc3339};
use crate::policy::{ANONYMOUS, Policy, Proof, UNIDENTIFIED};
use crate::source::Keyring;
use crate::sqs::Sqs;
use crate::store::Store;
use crate::telemetry::Metrics;
use anyhow::{Context as _, anyhow};
use clap::builder::PossibleValuesParser;
use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use uuid::Uuid;

/// Letters looked up at once.
const BATCH: usize = 200;

#[derive(Debug, Args)]
pub(super) struct Dead {
    /// Whose dead-letter queue: rabbitmq or sqs; absent: that of the first of `requests_from`.
    #[arg(long, value_name = "NAME", value_parser = transport, global = true)]
    over: Option<Transport>,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List dead letters, oldest first where the queue has an order, with the refusals that they are of. Takes none of
    /// them; while it runs, nobody else sees them. A letter that Keyferry never refused is given a refusal,
    /// `dead_lettered_by_broker`; one of a flood in which more were refused than are remembered, `refused_in_flood`. For SQS every look is a receipt: a redrive policy of the dead-letter queue's own would
    /// move letters away.
    List(List),
    /// Show everything about one dead letter. Values are told by their length.
    Show(Show),
    /// Put dead letters back into the queue of requests, once what they were refused for is mended.
    Redrive(Redrive),
}

/// Which letters are meant.
#[derive(Debug, Args)]
struct Filter {
    /// Only those refused with this code.
    #[arg(long, value_parser = codes())]
    code: Option<String>,
    /// Only those of this principal.
    #[arg(long, value_name = "NAME")]
    principal: Option<String>,
    /// Only those refused since then: a time (RFC 3339) or an age, such as 90s, 5m or 2h.
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<Since>,
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    filter: Filter,
    /// Letters shown at most.
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
}

#[derive(Debug, Args)]
struct Show {
    /// The refusal's id, as `dead list` and the event of the refusal have it.
    id: Uuid,
    /// Show values too. They are what the publisher sent, and can be anything.
    #[arg(long)]
    unmasked: bool,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).multiple(true).args(["ids", "code", "principal", "since", "all"]))]
struct Redrive {
    /// Refusals' ids, as `dead list` has them.
    #[arg(value_name = "ID")]
    ids: Vec<Uuid>,
    #[command(flatten)]
    filter: Filter,
    /// All of them.
    #[arg(long, conflicts_with_all = ["ids", "code", "principal", "since"])]
    all: bool,
    /// So many in a second at most, as in 50/s.
    #[arg(long, value_name = "N/s", value_parser = rate)]
    rate: Option<u32>,
    /// Letters put back at most.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Say what would be put back, and change nothing.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    sign: SignArgs,
}

/// A point in time, or one that lies so far back.
#[derive(Clone, Copy, Debug)]
pub(super) enum Since {
    Time(OffsetDateTime),
    Age(Duration),
}

impl Dead {
    pub(super) async fn run(mut self, loaded: &Loaded, output: Output) -> Result<(), Failed> {
        let settings = &loaded.settings;
        let first = settings.requests_from.first().copied();
        let transport = self.over.or(first).unwrap_or(Transport::RabbitMq);
        let sender = match &mut self.action {
            Action::Redrive(redrive) => Some(std::mem::take(&mut redrive.sign).sender(loaded, transport)?),
            Action::List(_) | Action::Show(_) => None,
        };
        let (user_id, signer) = sender.map_or((None, None), |sender| (sender.user_id, sender.signer));
        let store = open_store(loaded).await?;
        let stamp = match signer {
            Some(signer) => Some(Stamp::new(signer, store.now().await?)),
            None => None,
        };
        match transport {
            Transport::RabbitMq => {
                let rabbitmq = &settings.rabbitmq;
                let queues = rabbitmq::Queues {
                    broker: open_broker(loaded)?,
                    dead: rabbitmq.dead_letter_queue.clone(),
                    requests: rabbitmq.queue.clone(),
                    user_id,
                    stamp,
                };
                self.action.run(&Desk::open(loaded, transport, store, queues).await?, output).await
            }
            Transport::Sqs => {
                let (requests, dead) = loaded.sqs_requests_urls()?;
                let client = Sqs::connect(settings.sqs.region.as_deref(), &Metrics::new()?).await;
                let queues = sqs::Queues {
                    dead: client.queue(dead),
                    requests: client.queue(requests),
                    visibility: settings.sqs.visibility(),
                    stamp,
                };
                self.action.run(&Desk::open(loaded, transport, store, queues).await?, output).await
            }
        }
    }
}

impl Action {
    async fn run(self, desk: &Desk<impl DeadLetters>, output: Output) -> Result<(), Failed> {
        match self {
            Self::List(list) => list.run(desk, output).await,
            Self::Show(show) => show.run(desk, output).await,
            Self::Redrive(redrive) => redrive.run(desk, output).await,
        }
    }
}

/// What every one of these commands works with.
struct Desk<D> {
    store: Store,
    /// Without it, a message that is no request could not be told from another.
    keyring: Keyring,
    queues: D,
    policy: Policy,
    /// What senders prove, by which a letter's own word is read.
    proof: Proof,
}

impl<D: DeadLetters> Desk<D> {
    async fn open(loaded: &Loaded, transport: Transport, store: Store, queues: D) -> Result<Self, Failed> {
        // Letters can be looked at where no worker runs.
        let policy = if loaded.settings.policy.is_some() { loaded.policy()? } else { Policy::AllowAll };
        let keyring = open_keyring(loaded, &store).await?;
        let proof = loaded.proof(transport, &policy)?;
        Ok(Self { store, keyring, queues, policy, proof })
    }

    fn matcher(&self) -> Matcher<'_> {
        Matcher {
            store: &self.store,
            keyring: &self.keyring,
            requests: self.queues.requests(),
            transport: D::TRANSPORT,
            stranger: if matches!(self.policy, Policy::AllowAll) { ANONYMOUS } else { UNIDENTIFIED },
            policy: self.policy.digest(),
            proof: &self.proof,
        }
    }

    /// A session, and what has to be known of it.
    async fn session(&self) -> Result<D::Session, Failed> {
        let session = self.queues.open().await.context("the dead-letter queue cannot be read")?;
        let Census { cautions, .. } = session.census();
        for caution in cautions {
            eprintln!("keyferry: warning: {caution}");
        }
        Ok(session)
    }
}

impl Filter {
    /// A letter without a refusal is matched by no filter.
    fn matches(&self, known: &Known, now: OffsetDateTime) -> bool {
        let Self { code, principal, since } = self;
        let row = known.standing.row();
        code.as_ref().is_none_or(|code| row.is_some_and(|row| row.code == *code))
            && principal.as_ref().is_none_or(|principal| row.is_some_and(|row| row.principal == *principal))
            && since.is_none_or(|since| row.is_some_and(|row| row.refused_at >= since.at(now)))
    }
}

impl Since {
    /// The time that is meant.
    pub(super) fn at(self, now: OffsetDateTime) -> OffsetDateTime {
        match self {
            Self::Time(time) => time,
            // Before all that could be meant.
            Self::Age(age) => {
                now.checked_sub(age.try_into().unwrap_or(time::Duration::MAX)).unwrap_or(OffsetDateTime::UNIX_EPOCH)
            }
        }
    }
}

/// What a list has found: of a letter only what is shown.
#[derive(Default)]
struct Found {
    letters: Vec<Value>,
    recorded: HashSet<Uuid>,
}

impl List {
    async fn run<D: DeadLetters>(self, desk: &Desk<D>, output: Output) -> Result<(), Failed> {
        let mut session = desk.session().await?;
        let waiting = session.census().waiting;
        let found = self.look(desk, &mut session).await;
        // Also after a fault: SQS would hide letters for a while.
        let closed = session.give_back().await;
        let Found { letters, recorded } = found?;
        let report = json!({"letters": letters, "waiting": waiting, "recorded": recorded.len()});
        output.value(&report, |_| table(&letters));
        if !output.json {
            eprintln!("{} shown, {waiting} in the queue {}", letters.len(), desk.queues.dead());
            if !recorded.is_empty() {
                eprintln!("{} had no refusal that is known and were given one", recorded.len());
            }
        }
        Ok(closed?)
    }

    async fn look<D: DeadLetters>(&self, desk: &Desk<D>, session: &mut D::Session) -> anyhow::Result<Found> {
        let now = desk.store.now().await?;
        let limit = usize::try_from(self.limit).unwrap_or(usize::MAX);
        let mut found = Found::default();
        while found.letters.len() < limit {
            let letters = session.next_batch(BATCH).await?;
            if letters.is_empty() {
                break;
            }
            let known = desk.matcher().record(letters).await?;
            found.recorded.extend(known.iter().filter_map(newly_recorded));
            found.letters.extend(known.iter().filter(|known| self.filter.matches(known, now)).map(summary));
        }
        found.letters.truncate(limit);
        Ok(found)
    }
}

impl Show {
    async fn run<D: DeadLetters>(self, desk: &Desk<D>, output: Output) -> Result<(), Failed> {
        let mut session = desk.session().await?;
        let found = self.find(desk, &mut session).await;
        let closed = session.give_back().await;
        match found? {
            Some(known) => {
                output.value(&self.details(&known), |details| {
                    serde_json::to_string_pretty(details).unwrap_or_else(|error| error.to_string())
                });
                Ok(closed?)
            }
            None => Err(self.missing(desk).await?.into()),
        }
    }

    async fn find<D: DeadLetters>(&self, desk: &Desk<D>, session: &mut D::Session) -> anyhow::Result<Option<Known>> {
        loop {
            let letters = session.next_batch(BATCH).await?;
            if letters.is_empty() {
                return Ok(None);
            }
            let known = desk.matcher().record(letters).await?;
            if let Some(found) = known.into_iter().find(|known| refusal_id(known) == Some(self.id)) {
                return Ok(Some(found));
            }
        }
    }

    fn details(&self, known: &Known) -> Value {
        let letter = &known.letter;
        let shown = |text: &String| if self.unmasked { text.clone() } else { masked_text(text) };
        let headers: serde_json::Map<String, Value> =
            letter.headers.iter().map(|(name, value)| (name.clone(), json!(shown(value)))).collect();
        let mut details = summary(known);
        if let Some(details) = details.as_object_mut() {
            let sender = letter.sender.as_ref().map(|sender| match sender {
                Word::RabbitMqUser(user) | Word::PassedOn(user) => json!({"kind": "rabbitmq_user", "name": user}),
                Word::AwsRole(role) => json!({"kind": "aws_role", "name": role}),
            });
            details.insert("message".into(), json!(known.standing.row().map(|row| &row.message)));
            details.insert("ingress".into(), json!(known.standing.row().map(|row| &row.ingress)));
            details.insert("reason".into(), json!(letter.reason));
            details.insert("sender".into(), json!(sender));
            details.insert("content_type".into(), json!(letter.content_type));
            details.insert("message_id".into(), json!(letter.message_id.as_ref().map(shown)));
            details.insert("headers".into(), Value::Object(headers));
            details.insert("bytes".into(), json!(letter.body.len()));
            details.insert("body".into(), if self.unmasked { whole(&letter.body) } else { masked(&letter.body) });
        }
        details
    }

    /// Why there is nothing to be shown.
    async fn missing(&self, desk: &Desk<impl DeadLetters>) -> Result<anyhow::Error, Failed> {
        let Self { id, .. } = self;
        let message = match desk.store.refusal(*id).await? {
            Some(row) => format!(
                "the message of the refusal {id} ({}, {}) is not in the queue {}: it was sent again, taken out, or kept \
                 for as long as the queue keeps messages",
                row.code,
                rfc3339(row.refused_at),
                desk.queues.dead()
            ),
            None => format!("no refusal has the id {id}; see keyferry dead list"),
        };
        Ok(Coded { code: "dead_letter_unknown", message }.into())
    }
}

/// What a redrive has done so far.
#[derive(Default)]
struct Tally {
    seen: u64,
    /// Copies of accepted requests, which stay where they are.
    accepted: u64,
    /// Refusals' ids, in the queue's order.
    matched: Vec<Uuid>,
    recorded: HashSet<Uuid>,
    moved: u64,
    /// Those that stay though they were chosen.
    left: u64,
}

impl Redrive {
    async fn run<D: DeadLetters>(self, desk: &Desk<D>, output: Output) -> Result<(), Failed> {
        let now = desk.store.now().await?;
        let mut session = desk.session().await?;
        let bar = progress_bar(session.census().waiting, "dead letters");
        let mut tally = Tally::default();
        let mut pace = Pace::new(self.rate);
        let outcome = loop {
            let letters = match session.next_batch(pace.most()).await {
                Ok(letters) if letters.is_empty() => break Ok(()),
                Ok(letters) => letters,
                Err(error) => break Err(anyhow::Error::from(error)),
            };
            bar.inc(letters.len() as u64);
            tally.seen += letters.len() as u64;
            let chosen = self.choose(desk, letters, now, &mut tally).await;
            match chosen {
                Ok(chosen) if self.dry_run || chosen.is_empty() => {}
                Ok(chosen) => {
                    pace.wait(chosen.len()).await;
                    if let Err(error) = put_back(&mut session, &chosen, &mut tally).await {
                        break Err(error);
                    }
                }
                Err(error) => break Err(error),
            }
            bar.set_message(format!("{} put back", tally.moved));
            if self.is_full(&tally) {
                break Ok(());
            }
        };
        bar.finish_and_clear();
        // After a fault there may be nothing left to close.
        let closed = session.give_back().await.map_err(anyhow::Error::from);
        self.report(&tally, output);
        outcome.and(closed).with_context(|| {
            format!("{} dead letters were put back before this, and a few more may have been", tally.moved)
        })?;
        if tally.left > 0 {
            return Err(anyhow!("{} dead letters could not be put back, and stay", tally.left).into());
        }
        let missing = self.ids.iter().filter(|id| !tally.matched.contains(id)).count();
        if missing > 0 && !self.is_full(&tally) {
            return Err(anyhow!(
                "{missing} of the refusals named have no dead letter that matches; see keyferry dead list"
            )
            .into());
        }
        Ok(())
    }

    /// The letters of a batch that are to be put back.
    async fn choose(
        &self,
        desk: &Desk<impl DeadLetters>,
        letters: Vec<crate::dead::Letter>,
        now: OffsetDateTime,
        tally: &mut Tally,
    ) -> anyhow::Result<Vec<Chosen>> {
        let known =
            if self.dry_run { desk.matcher().look(letters).await? } else { desk.matcher().record(letters).await? };
        let mut chosen = Vec::new();
        for (place, known) in known.iter().enumerate() {
            tally.recorded.extend(newly_recorded(known));
            tally.accepted += u64::from(known.standing == Standing::Accepted);
            let is_named = self.ids.is_empty() || refusal_id(known).is_some_and(|id| self.ids.contains(&id));
            if !is_named || self.is_full(tally) || !self.filter.matches(known, now) {
                continue;
            }
            match refusal_id(known) {
                Some(refusal) => {
                    tally.matched.push(refusal);
                    chosen.push(Chosen { place, refusal });
                }
                // It would be given a refusal first.
                None if self.dry_run => tally.matched.push(Uuid::nil()),
                None => {}
            }
        }
        Ok(chosen)
    }

    fn is_full(&self, tally: &Tally) -> bool {
        self.limit.is_some_and(|limit| tally.matched.len() as u64 >= limit)
    }

    fn report(&self, tally: &Tally, output: Output) {
        let Tally { seen, accepted, matched, recorded, moved, left } = tally;
        let report = json!({
            "dry_run": self.dry_run,
            "seen": seen,
            "matched": matched.len(),
            "redriven": moved,
            "left": left,
            "recorded": recorded.len(),
            "copies_of_accepted": accepted,
        });
        output.value(&report, |_| {
            let text = if self.dry_run {
                format!("{} of {seen} dead letters would be put back; nothing was changed", matched.len())
            } else {
                format!("{moved} of {seen} dead letters were put back into the queue of requests")
            };
            match accepted {
                0 => text,
                count => format!("{text}; {count} are copies of requests that were accepted, and stay"),
            }
        });
    }
}

async fn put_back(session: &mut impl Session, chosen: &[Chosen], tally: &mut Tally) -> anyhow::Result<()> {
    let mut stopped = None;
    for (Chosen { refusal, .. }, sent) in chosen.iter().zip(session.redrive(chosen).await?) {
        match sent {
            Sent::Moved => tally.moved += 1,
            Sent::Copied(why) => {
                tally.moved += 1;
                eprintln!("keyferry: warning: {refusal}: was put back, and its dead letter is still there: {why}");
            }
            Sent::Left(why) => {
                tally.left += 1;
                eprintln!("keyferry: warning: {refusal}: stays: {why}");
            }
            Sent::Stopped(why) => stopped = Some(why),
        }
    }
    stopped.map_or(Ok(()), |why| Err(anyhow!(why)))
}

/// Keeps to a rate: letters leave in small groups, each not before its time.
struct Pace {
    rate: Option<u32>,
    next: Instant,
}

impl Pace {
    fn new(rate: Option<u32>) -> Self {
        Self { rate, next: Instant::now() }
    }

    /// Letters taken at once: a tenth of a second's worth.
    fn most(&self) -> usize {
        self.rate.map_or(BATCH, |rate| usize::try_from(rate / 10).unwrap_or(BATCH).clamp(1, BATCH))
    }

    async fn wait(&mut self, count: usize) {
        let at = self.reserve(count, Instant::now());
        tokio::time::sleep_until(at.into()).await;
    }

    /// When so many may leave; the next ones as much later as they are worth.
    fn reserve(&mut self, count: usize, now: Instant) -> Instant {
        let Some(rate) = self.rate else { return now };
        // Time in which nothing was there to be sent is not made up for.
        let at = self.next.max(now);
        self.next =
            at + Duration::from_secs(1).mul_f64(f64::from(u32::try_from(count).unwrap_or(u32::MAX)) / f64::from(rate));
        at
    }
}

fn newly_recorded(known: &Known) -> Option<Uuid> {
    match &known.standing {
        Standing::Recorded(row) => Some(row.id),
        _ => None,
    }
}

fn refusal_id(known: &Known) -> Option<Uuid> {
    known.standing.row().map(|row| row.id)
}

/// What a line of the list says. No value of the body but its names: id, operation and key.
fn summary(known: &Known) -> Value {
    let row = known.standing.row();
    let code = match &known.standing {
        Standing::Accepted => "accepted_before",
        Standing::Unrecorded => "",
        Standing::Refused(row) | Standing::Recorded(row) => &row.code,
    };
    json!({
        "refusal": row.map(|row| row.id),
        "refused_at": row.map(|row| rfc3339(row.refused_at)),
        "died_at": known.letter.died_at.map(rfc3339),
        "code": code,
        "field": row.and_then(|row| row.field.as_ref()),
        "principal": row.map(|row| &row.principal),
        "fold": row.and_then(|row| row.fold),
        "request_id": known.request_id,
        "operation": known.operation.map(crate::job::Operation::as_str),
        "key": known.key,
        "queue": known.letter.origin,
    })
}

fn table(letters: &[Value]) -> String {
    let head = ["REFUSAL", "WHEN", "CODE", "FIELD", "PRINCIPAL", "REQUEST", "OPERATION", "KEY", "QUEUE"];
    let names = ["refusal", "refused_at", "code", "field", "principal", "request_id", "operation", "key", "queue"];
    let rows: Vec<[String; 9]> =
        letters.iter().map(|letter| names.map(|name| letter[name].as_str().unwrap_or_default().to_owned())).collect();
    super::output::table(head, &rows)
}

fn codes() -> PossibleValuesParser {
    PossibleValuesParser::new(RefusalCode::ALL.iter().map(|code| code.as_str()))
}

pub(super) fn since(text: &str) -> Result<Since, String> {
    OffsetDateTime::parse(text, &Rfc3339)
        .map(Since::Time)
        .or_else(|_| duration(text).map(Since::Age))
        .map_err(|_| "expected a time, such as 2027-01-31T12:00:00Z, or an age, such as 90s, 5m or 2h".into())
}

fn rate(text: &str) -> Result<u32, String> {
    let count = text.strip_suffix("/s").and_then(|count| count.parse().ok());
    count.filter(|count| (1..=100_000).contains(count)).ok_or_else(|| "expected 1/s to 100000/s, such as 50/s".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_to_and_lost_time_is_not_made_up_for() {
        let mut pace = Pace::new(Some(50));
        assert_eq!(pace.most(), 5);
        let start = pace.next;
        let at: Vec<Duration> = (0..4).map(|_| pace.reserve(5, start) - start).collect();
        assert_eq!(at, [0, 100, 200, 300].map(Duration::from_millis));
        let later = start + Duration::from_secs(60);
        assert_eq!(pace.reserve(5, later), later);
        assert_eq!(pace.reserve(5, later), later + Duration::from_millis(100));
        assert_eq!(Pace::new(None).most(), BATCH);
        assert_eq!(Pace::new(Some(1)).most(), 1);
        assert_eq!(Pace::new(Some(100_000)).most(), BATCH);
    }

    #[test]
    fn rates_and_times_are_read() {
        assert_eq!((rate("50/s"), rate("1/s")), (Ok(50), Ok(1)));
        for text in ["", "50", "0/s", "-1/s", "x/s", "50/m"] {
            assert!(rate(text).is_err(), "{text}");
        }
        assert!(matches!(since("2h"), Ok(Since::Age(age)) if age == Duration::from_secs(7_200)));
        assert!(matches!(since("2027-01-31T12:00:00Z"), Ok(Since::Time(_))));
        assert!(since("yesterday").is_err());
    }
}
