//! Death at every durable boundary: the process aborts, another takes over, and nobody can tell afterwards.
//!
//! Each boundary alone, by an import, a delete and a refusal as far as they come past it; and every ordered pair: the first
//! process dies at the one, its successor at the other, the third drains. The invariants are judged after each.

use crate::support::fake::WORKER;
use crate::support::proof::decrypts;
use crate::support::world::{Tuning, World, request};
use serde_json::{Value, json};
use std::time::Duration;

/// Where a process dies, in the order of a job's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Boundary {
    Received,
    Committed,
    Announced,
    MessageSettled,
    Claimed,
    Parameters,
    Chosen,
    Wrapped,
    Sent,
    Answered,
    Ended,
    Settled,
    Published,
}

/// What a message asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Import,
    Delete,
    /// What no request is.
    Nothing,
}

impl Boundary {
    // The way in three parts.
    const AT_INTAKE: [Self; 4] = [Self::Received, Self::Committed, Self::Announced, Self::MessageSettled];
    const BEFORE_AWS: [Self; 4] = [Self::Claimed, Self::Parameters, Self::Chosen, Self::Wrapped];
    const AFTER_AWS: [Self; 5] = [Self::Sent, Self::Answered, Self::Ended, Self::Settled, Self::Published];

    fn failpoint(self) -> &'static str {
        match self {
            Self::Received => "intake.after_receive",
            Self::Committed => "intake.after_commit",
            Self::Announced => "intake.before_settle",
            Self::MessageSettled => "intake.after_settle",
            Self::Claimed => "worker.after_claim",
            Self::Parameters => "worker.after_parameters",
            Self::Chosen => "worker.after_prepare",
            Self::Wrapped => "worker.after_wrap",
            Self::Sent => "kms.before_answer",
            Self::Answered => "worker.after_answer",
            Self::Ended => "worker.before_settle",
            Self::Settled => "worker.after_settle",
            Self::Published => "outbox.after_publish",
        }
    }

    fn is_of_intake(self) -> bool {
        Self::AT_INTAKE.contains(&self)
    }

    /// Whether such a message comes past it on its way.
    fn is_passed_by(self, asked: Asked) -> bool {
        match asked {
            Asked::Import => true,
            Asked::Delete => !matches!(self, Self::Parameters | Self::Wrapped),
            Asked::Nothing => self.is_of_intake() || self == Self::Published,
        }
    }

    /// Whether a successor comes past `next` by what is left alone, whatever else was going on.
    fn leads_to(self, next: Self) -> bool {
        match self {
            // All messages come again.
            Self::Received | Self::Committed | Self::Announced => true,
            // The import may have ended meanwhile, and its event may have been told.
            Self::MessageSettled | Self::Settled => false,
            Self::Published => next == Self::Published,
            // No job had come past it, so that the import is left; whether messages are is chance.
            _ => !next.is_of_intake(),
        }
    }

    /// What a lone import has left when its worker died: jobs, choices of material, imports, ends; less where a job that
    /// was accepted goes its own way meanwhile.
    fn on_record(self) -> &'static [i64] {
        match self {
            Self::Received => &[0, 0, 0, 0],
            Self::Committed | Self::Announced | Self::MessageSettled => &[1],
            Self::Claimed | Self::Parameters => &[1, 0, 0, 0],
            Self::Chosen | Self::Wrapped => &[1, 1, 0, 0],
            Self::Sent | Self::Answered | Self::Ended => &[1, 1, 1, 0],
            Self::Settled | Self::Published => &[1, 1, 1, 1],
        }
    }
}

/// A world in which processes die, one scenario after the other.
struct Deaths {
    world: World,
    /// Requests so far, by which they are numbered.
    asked: usize,
    /// Requests of the scenario that have to succeed.
    open: Vec<String>,
    /// Keys that hold material, or will at the end of the scenario.
    held: Vec<String>,
    fresh: Vec<String>,
    refused: usize,
}

impl Deaths {
    async fn begin() -> Self {
        // Nothing runs out by itself: the clock is moved when a process has died.
        let world = World::new(Tuning { signature_life_ms: 20_000, ..Tuning::default() }).await;
        // Few connections are made sooner; and so many starts at once can take long.
        world.respell("[database]", "[database]\nconnections = 3\nconnect_timeout_ms = 30000");
        world.symmetric_key("payroll").await;
        Self { world, asked: 0, open: Vec::new(), held: Vec::new(), fresh: Vec::new(), refused: 0 }
    }

    /// Publishes one message; a delete only where a key holds material.
    async fn ask(&mut self, asked: Asked) -> Option<Value> {
        self.asked += 1;
        let id = format!("r{}", self.asked);
        let message = match asked {
            Asked::Import => {
                let arn = self.world.fake.key().await;
                self.fresh.push(arn.clone());
                request(&id, &arn, json!({"source_key_identifier": "payroll"}))
            }
            Asked::Delete => request(&id, &self.held.pop()?, json!({"operation": "delete"})),
            Asked::Nothing => json!({"id": id, "key": "nonsense"}),
        };
        if asked == Asked::Nothing {
            self.refused += 1;
        } else {
            self.open.push(id);
        }
        self.world.publish(message.clone()).await;
        Some(message)
    }

    /// The import comes first: whoever dies at its first batch has it in hand.
    async fn ask_for_all(&mut self) {
        let import = self.ask(Asked::Import).await;
        self.ask(Asked::Delete).await;
        self.ask(Asked::Nothing).await;
        // And a copy.
        self.world.publish(import.unwrap()).await;
    }

    /// A process that has to come to the boundary, and dies there; its leases run out.
    async fn die_at(&mut self, boundary: Boundary) {
        let at = self.world.start(&format!("{}=return", boundary.failpoint())).await;
        assert!(self.world.workers[at].aborted().await, "{boundary:?} did not end the worker");
        // Longer than a lease on a line, a lease on events and the life of a signature.
        self.world.db.advance(Duration::from_secs(31)).await;
    }

    /// A process that lives does what is left.
    async fn drain(&mut self) {
        self.world.serve().await;
        for id in std::mem::take(&mut self.open) {
            self.world.succeeded(&id).await;
        }
        self.world.dead_letters(self.refused).await;
        self.world.judge().await;
        // What was in doubt is over: it keeps no line closed to the next scenario.
        self.world.db.advance(Duration::from_secs(31)).await;
        self.held.append(&mut self.fresh);
    }

    async fn alone(&mut self, boundary: Boundary, asked: Asked) {
        let message = self.ask(asked).await.expect("a key holds material");
        self.die_at(boundary).await;
        match asked {
            Asked::Import => self.is_on_record(boundary).await,
            Asked::Nothing if matches!(boundary, Boundary::Committed | Boundary::Announced) => {
                assert_eq!((self.world.refused(1).await.len(), self.world.dead().await.len()), (1, 0));
            }
            Asked::Delete | Asked::Nothing => {}
        }
        self.drain().await;
        if boundary == Boundary::Published {
            let told = self.world.events_of(message["id"].as_str().unwrap()).await;
            assert_eq!(told.len(), 2, "at least once, under one id");
        }
    }

    /// Of the world's first import.
    async fn is_on_record(&mut self, boundary: Boundary) {
        let imports = self.world.fake.journal("effect=imported").await;
        let imports = imports.iter().filter(|call| call["access_key"] == WORKER).count();
        let chosen = "select count(*) from audit_entry where entry::jsonb ->> 'kind' = 'material_chosen'";
        let seen = [
            self.world.count("select count(*) from job").await,
            self.world.count(chosen).await,
            i64::try_from(imports).unwrap(),
            self.world.count("select count(*) from job where state = 'succeeded'").await,
        ];
        let wanted = boundary.on_record();
        assert_eq!(&seen[..wanted.len()], wanted, "{boundary:?}");
        if matches!(boundary, Boundary::Sent | Boundary::Answered | Boundary::Ended) {
            let doubts = self.world.count("select count(*) from progress where in_doubt").await;
            assert_eq!(doubts, 1, "a successor knows that a call may have been made");
        }
        if boundary == Boundary::Published {
            assert_eq!(self.world.events_now("r1").await.len(), 1);
            assert_eq!(self.world.count("select count(*) from outbox").await, 1);
        }
    }
}

async fn dies_alone_at(boundary: Boundary) {
    let mut deaths = Deaths::begin().await;
    for asked in [Asked::Import, Asked::Delete, Asked::Nothing] {
        if boundary.is_passed_by(asked) {
            deaths.alone(boundary, asked).await;
        }
    }
    deaths.world.finish().await;
}

/// The first process dies at the boundary, and its successor at each of a part of the way.
async fn dies_twice_from(first: Boundary, part: &[Boundary]) {
    let mut deaths = Deaths::begin().await;
    for second in part.iter().copied() {
        deaths.ask_for_all().await;
        deaths.die_at(first).await;
        if !first.leads_to(second) {
            deaths.ask_for_all().await;
        }
        deaths.die_at(second).await;
        deaths.drain().await;
    }
    deaths.world.finish().await;
}

macro_rules! deaths {
    ($($boundary:ident: $name:ident),* $(,)?) => {
        mod alone {
            $(#[tokio::test] async fn $name() { super::dies_alone_at(super::Boundary::$boundary).await; })*
        }
        deaths!(in_parts then_at_intake: AT_INTAKE; $($boundary: $name),*);
        deaths!(in_parts then_before_aws: BEFORE_AWS; $($boundary: $name),*);
        deaths!(in_parts then_after_aws: AFTER_AWS; $($boundary: $name),*);
    };
    (in_parts $part:ident: $of:ident; $($boundary:ident: $name:ident),*) => {
        mod $part {
            use super::Boundary;
            $(#[tokio::test] async fn $name() { super::dies_twice_from(Boundary::$boundary, &Boundary::$of).await; })*
        }
    };
}

deaths!(
    Received: after_a_message_was_received,
    Committed: after_the_inbox_was_committed,
    Announced: before_the_message_was_settled,
    MessageSettled: after_the_message_was_settled,
    Claimed: after_a_line_was_claimed,
    Parameters: after_the_parameters_were_obtained,
    Chosen: after_the_choice_of_material_was_committed,
    Wrapped: after_the_material_was_wrapped,
    Sent: after_aws_took_it_and_before_the_answer_was_read,
    Answered: after_the_answer_was_read_and_before_anything_was_committed,
    Ended: before_the_outcome_was_committed,
    Settled: after_the_outcome_was_committed,
    Published: after_an_event_was_published_and_before_it_was_marked,
);

#[tokio::test]
async fn after_the_import_and_before_it_was_looked_at() {
    let mut world = World::new(Tuning::hasty()).await;
    let bytes = world.symmetric_key("payroll").await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, json!({"source_key_identifier": "payroll"}))).await;
    let first = world.start("worker.after_import=return").await;
    assert!(world.workers[first].aborted().await);
    world.serve().await;
    world.succeeded("r1").await;
    assert!(decrypts(&world.fake, &arn, &bytes).await);
    world.finish().await;
}

#[tokio::test]
async fn after_aws_took_generated_bytes_the_same_bytes_are_imported_again() {
    let mut world = World::new(Tuning::hasty()).await;
    let arn = world.fake.key().await;
    world.publish(request("r1", &arn, json!({}))).await;
    let first = world.start("worker.after_answer=return").await;
    assert!(world.workers[first].aborted().await);
    world.serve().await;
    let job = world.succeeded("r1").await;
    let imports = world.fake.journal(&format!("key={arn}&effect=imported")).await;
    let different: std::collections::BTreeSet<String> =
        imports.iter().map(|call| call["effect"]["imported"]["material_sha256"].to_string()).collect();
    assert_eq!(different.len(), 1, "{imports:#?}");
    assert_eq!(world.count("select count(*) from source_key").await, 1);
    assert!(job.attempts >= 2);
    world.finish().await;
}
