//! The credentials of a role: asked for once for all Regions of its account, renewed before they end.
//!
//! Whoever needs them and finds none waits a moment, no longer: an attempt that waits holds a permit that a job of
//! another account could use. One `AssumeRole` is under way at a time. While the last one has failed, one attempt finds
//! out whether STS has come back; the others are told at once why there are no credentials, and go into a delay.

use super::call_error::{CallError, ErrorKind};
use super::guard::{Gate, LeaseGuard};
use super::{Call, Role};
use crate::telemetry::AwsCalls;
use aws_credential_types::Credentials;
use aws_sdk_sts::operation::assume_role::AssumeRoleOutput;
use secrecy::ExposeSecret as _;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::watch;

/// How long an attempt waits for credentials. STS answers in a fraction of it.
const PATIENCE: Duration = Duration::from_secs(1);
/// After a failure no other `AssumeRole` is made for this long; twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// At most. A job that waits for a role to become assumable looks no more often.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// Credentials that are younger are not renewed again: one `AssumeRole` a second, whatever KMS says of them.
const YOUNG: Duration = Duration::from_secs(1);

/// The session of a role.
pub(super) struct Session {
    role: Role,
    /// Of the target, and so of the role.
    account: String,
    sts: aws_sdk_sts::Client,
    attempt_timeout: Duration,
    calls: AwsCalls<Call, ErrorKind>,
    state: watch::Sender<State>,
}

#[derive(Default)]
struct State {
    held: Option<Held>,
    /// Why there is nothing new, since the last success.
    failed: Option<Failed>,
    /// An `AssumeRole` is under way.
    is_asking: bool,
    /// The access key of the credentials before these. Calls that were signed with them may still end.
    former: Option<String>,
}

/// Credentials, by this machine's monotonic clock.
#[derive(Clone)]
struct Held {
    credentials: Credentials,
    since: Instant,
    renew_at: Instant,
    ends_at: Instant,
    /// KMS did not take them, somewhere.
    is_distrusted: bool,
}

#[derive(Clone)]
struct Failed {
    error: CallError,
    /// In a row.
    times: u32,
    again_at: Instant,
}

/// What an attempt does that needs credentials.
enum Turn {
    Use(Credentials),
    Wait,
    GoAway(CallError),
}

impl Session {
    pub(super) fn new(
        role: Role,
        account: String,
        sts: aws_sdk_sts::Client,
        attempt_timeout: Duration,
        calls: AwsCalls<Call, ErrorKind>,
    ) -> Arc<Self> {
        Arc::new(Self { role, account, sts, attempt_timeout, calls, state: watch::Sender::new(State::default()) })
    }

    /// The credentials, or why there are none.
    pub(super) async fn credentials(self: &Arc<Self>) -> Result<Credentials, CallError> {
        // Well before the time-out of the call that is to be signed: its own words would tell less.
        self.credentials_within(PATIENCE.min(self.attempt_timeout / 2)).await
    }

    /// The same for whoever has the time to wait for STS's answer.
    pub(super) async fn credentials_at_length(self: &Arc<Self>) -> Result<Credentials, CallError> {
        self.credentials_within(2 * self.attempt_timeout).await
    }

    /// Whether these are, or were just now, this session's, of which KMS says that they are not good. Others are asked for
    /// by the next call; until they are here these are used, since it may be one Region alone that does not take them.
    pub(super) fn distrusts(&self, access_key: &str) -> bool {
        let (mut is_own, now) = (false, Instant::now());
        self.state.send_if_modified(|state| {
            is_own = state.distrusts(access_key, now);
            false
        });
        is_own
    }

    async fn credentials_within(self: &Arc<Self>, patience: Duration) -> Result<Credentials, CallError> {
        let mut states = self.state.subscribe();
        match self.turn() {
            Turn::Use(credentials) => return Ok(credentials),
            Turn::GoAway(error) => return Err(error),
            Turn::Wait => {}
        }
        let slow = || self.failure(ErrorKind::NoSession, "STS has not answered yet");
        if let Ok(Ok(state)) = tokio::time::timeout(patience, states.wait_for(|state| !state.is_asking)).await {
            return match (&state.held, &state.failed) {
                (Some(held), _) => Ok(held.credentials.clone()),
                (None, Some(failed)) => Err(failed.error.clone()),
                (None, None) => Err(slow()),
            };
        }
        // From now on nobody waits, until STS has answered.
        self.state.send_if_modified(|state| {
            if state.is_asking && state.failed.is_none() {
                state.failed = Some(Failed { error: slow(), times: 0, again_at: Instant::now() });
            }
            false
        });
        Err(slow())
    }

    /// Decides, and asks STS in the background where it is time to.
    fn turn(self: &Arc<Self>) -> Turn {
        let (now, mut turn, mut is_to_ask) = (Instant::now(), Turn::Wait, false);
        self.state.send_if_modified(|state| {
            (turn, is_to_ask) = state.turn(now);
            state.is_asking |= is_to_ask;
            false
        });
        if is_to_ask {
            // Not the attempt's own: others wait for it too, and it is to be known when the attempt has gone away.
            tokio::spawn(Arc::clone(self).ask());
        }
        turn
    }

    async fn ask(self: Arc<Self>) {
        let asking = Asking(&self);
        let outcome = self.assume().await;
        if let Err(error) = &outcome {
            tracing::warn!(aws.role = self.role.arn, aws.account = self.account, "{error}");
        }
        self.state.send_modify(|state| state.note(outcome, Instant::now()));
        drop(asking);
    }

    async fn assume(&self) -> Result<Held, CallError> {
        const OPERATION: Call = Call::AssumeRole;
        // Counted from before the call: credentials never seem good for longer than they are.
        let begun = Instant::now();
        // No lease: nothing is changed, and the time-out bounds it.
        let (gate, departure) = Gate::new(LeaseGuard::new(begun, 2 * self.attempt_timeout), self.attempt_timeout);
        let external_id = self.role.external_id.as_ref().map(|id| id.expose_secret().to_owned());
        let request = self
            .sts
            .assume_role()
            .role_arn(&self.role.arn)
            .role_session_name(&self.role.session_name)
            .duration_seconds(i32::try_from(self.role.session.as_secs()).unwrap_or(i32::MAX))
            .set_external_id(external_id);
        let answer = request.customize().interceptor(gate).send().await;
        if departure.happened() {
            self.calls.took(OPERATION, begun);
        }
        let outcome = answer
            .map_err(|error| CallError::of(OPERATION.as_str(), &error, &departure))
            .and_then(|answer| self.held(&answer, begun));
        self.calls.ended(OPERATION, outcome.as_ref().err().map(|error| error.kind));
        outcome.map_err(|error| self.told(error))
    }

    fn held(&self, answer: &AssumeRoleOutput, begun: Instant) -> Result<Held, CallError> {
        let part = |name| CallError::incomplete(Call::AssumeRole.as_str(), name);
        let given = answer.credentials().ok_or_else(|| part("Credentials"))?;
        let arn = answer.assumed_role_user().map_or("", |user| user.arn());
        if arn.split(':').nth(4) != Some(&self.account) {
            return Err(part("session of the target's account"));
        }
        let expiration = SystemTime::try_from(*given.expiration()).map_err(|_| part("readable Expiration"))?;
        let life = life(expiration).map_or(self.role.session, |life| life.min(self.role.session));
        let token = Some(given.session_token().to_owned());
        let credentials = Credentials::new(given.access_key_id(), given.secret_access_key(), token, None, "AssumeRole");
        Ok(Held::new(credentials, begun, life))
    }

    /// What a failed `AssumeRole` means to a call of KMS, of which nothing was sent.
    fn told(&self, error: CallError) -> CallError {
        let kind = match error.kind {
            // The worker's own credentials, by which the role is assumed.
            ErrorKind::Credentials => ErrorKind::Credentials,
            ErrorKind::AccessDenied | ErrorKind::Refused => ErrorKind::RoleDenied,
            _ => ErrorKind::NoSession,
        };
        let said: String = error.message.chars().take(300).collect();
        let Self { role: Role { arn, .. }, account, .. } = self;
        let message = match kind {
            ErrorKind::RoleDenied => format!(
                "the role {arn} of account {account} cannot be assumed: {said}; allow the worker sts:AssumeRole on it, and let \
                 its trust policy name who the worker is and the external id of the settings"
            ),
            ErrorKind::Credentials => {
                format!("the worker's own credentials do not serve to assume the role {arn}: {said}")
            }
            _ => format!("no credentials of the role {arn} for now: {said}"),
        };
        CallError { kind, message, ..error }
    }

    fn failure(&self, kind: ErrorKind, said: &str) -> CallError {
        let message = format!("no credentials of the role {} for now: {said}", self.role.arn);
        CallError { operation: Call::AssumeRole.as_str(), kind, code: None, message, aws_request_id: None }
    }
}

impl State {
    /// What an attempt does at this time, and whether STS is to be asked.
    fn turn(&self, now: Instant) -> (Turn, bool) {
        let is_due = !self.is_asking && self.failed.as_ref().is_none_or(|failed| failed.again_at <= now);
        match (&self.held, &self.failed) {
            (Some(held), _) if now < held.ends_at => {
                (Turn::Use(held.credentials.clone()), is_due && held.renew_at <= now)
            }
            (_, Some(failed)) if !is_due => (Turn::GoAway(failed.error.clone()), false),
            _ => (Turn::Wait, is_due),
        }
    }

    fn note(&mut self, outcome: Result<Held, CallError>, now: Instant) {
        match outcome {
            Ok(held) => {
                let before = self.held.replace(held);
                self.former = before.map(|before| before.credentials.access_key_id().to_owned()).or(self.former.take());
                self.failed = None;
            }
            Err(error) => {
                let is_definite = matches!(error.kind, ErrorKind::RoleDenied | ErrorKind::Credentials);
                let times = self.failed.as_ref().map_or(0, |failed| failed.times);
                let pause = FIRST_PAUSE.saturating_mul(1 << times.min(8)).min(LONGEST_PAUSE);
                self.failed = Some(Failed { error, times: times + 1, again_at: now + pause });
                // What has ended helps nobody; nor does what KMS does not take, if STS refuses others: it is STS that says
                // why. While STS is away they may still be good elsewhere.
                let useless = self.held.take_if(|held| held.ends_at <= now || (held.is_distrusted && is_definite));
                if let Some(useless) = useless {
                    self.former = Some(useless.credentials.access_key_id().to_owned());
                }
            }
        }
    }

    fn distrusts(&mut self, access_key: &str, now: Instant) -> bool {
        let held = self.held.as_mut().filter(|held| held.credentials.access_key_id() == access_key);
        let Some(held) = held else { return self.former.as_deref() == Some(access_key) };
        if held.since + YOUNG <= now {
            held.is_distrusted = true;
            held.renew_at = now;
        }
        true
    }
}

impl Held {
    /// Renewed when a quarter of their life is left.
    fn new(credentials: Credentials, since: Instant, life: Duration) -> Self {
        Self { credentials, since, renew_at: since + life * 3 / 4, ends_at: since + life, is_distrusted: false }
    }
}

/// Says that nobody asks any more, however the asking ends.
struct Asking<'a>(&'a Session);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        self.0.state.send_modify(|state| state.is_asking = false);
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("role", &self.role.arn).finish_non_exhaustive()
    }
}

/// How long something is good that ends then.
#[expect(clippy::disallowed_methods, reason = "AWS tells the end by the clock on the wall")]
fn life(expiration: SystemTime) -> Option<Duration> {
    expiration.duration_since(SystemTime::now()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Duration = Duration::from_secs(900);

    fn held(access_key: &str, since: Instant) -> Held {
        let credentials = Credentials::new(access_key, "secret", Some("token".into()), None, "tests");
        Held::new(credentials, since, LIFE)
    }

    fn error(kind: ErrorKind) -> CallError {
        CallError { operation: "AssumeRole", kind, code: None, message: "said".into(), aws_request_id: None }
    }

    /// What an attempt does, in a word, and whether STS is asked.
    fn turn(state: &State, now: Instant) -> (&'static str, bool) {
        let (turn, is_to_ask) = state.turn(now);
        let word = match turn {
            Turn::Use(_) => "use",
            Turn::Wait => "wait",
            Turn::GoAway(_) => "go away",
        };
        (word, is_to_ask)
    }

    #[test]
    fn the_first_asks_and_the_others_wait_with_it() {
        let (mut state, now) = (State::default(), Instant::now());
        assert_eq!(turn(&state, now), ("wait", true));
        state.is_asking = true;
        assert_eq!(turn(&state, now), ("wait", false));
        state.note(Ok(held("A", now)), now);
        state.is_asking = false;
        assert_eq!(turn(&state, now), ("use", false));
    }

    #[test]
    fn credentials_are_renewed_beside_their_use_and_not_used_past_their_end() {
        let now = Instant::now();
        let mut state = State { held: Some(held("A", now)), ..State::default() };
        assert_eq!(turn(&state, now + LIFE / 2), ("use", false));
        assert_eq!(turn(&state, now + LIFE * 4 / 5), ("use", true));
        // A renewal that fails takes nothing away.
        state.note(Err(error(ErrorKind::NoSession)), now + LIFE * 4 / 5);
        assert_eq!(turn(&state, now + LIFE * 4 / 5), ("use", false));
        assert_eq!(turn(&state, now + LIFE * 9 / 10), ("use", true));
        assert_eq!(turn(&state, now + LIFE), ("wait", true));
    }

    #[test]
    fn while_sts_fails_one_finds_out_and_the_others_go_away() {
        let (mut state, now) = (State::default(), Instant::now());
        state.note(Err(error(ErrorKind::RoleDenied)), now);
        assert_eq!(turn(&state, now), ("go away", false));
        let later = now + FIRST_PAUSE;
        assert_eq!(turn(&state, later), ("wait", true));
        state.is_asking = true;
        assert_eq!(turn(&state, later), ("go away", false));
        state.is_asking = false;
        // Pauses grow, and stay below the longest.
        for _ in 0..40 {
            state.note(Err(error(ErrorKind::RoleDenied)), now);
        }
        assert_eq!(turn(&state, now + LONGEST_PAUSE / 2), ("go away", false));
        assert_eq!(turn(&state, now + LONGEST_PAUSE), ("wait", true));
        state.note(Ok(held("A", now)), now);
        assert_eq!(turn(&state, now), ("use", false));
    }

    #[test]
    fn what_kms_does_not_take_is_renewed_and_used_by_other_regions_meanwhile() {
        let now = Instant::now();
        let mut state = State { held: Some(held("OLD", now)), ..State::default() };
        let later = now + Duration::from_secs(60);
        assert!(!state.distrusts("OTHER", later));
        assert_eq!(turn(&state, later), ("use", false));
        assert!(state.distrusts("OLD", later));
        assert_eq!(turn(&state, later), ("use", true));
        // Calls that were signed before still come back, and change nothing.
        state.note(Ok(held("NEW", later)), later);
        assert!(state.distrusts("OLD", later));
        assert!(state.distrusts("NEW", later), "it is the session's");
        assert_eq!(turn(&state, later), ("use", false), "it is younger than a second");
    }

    #[test]
    fn when_sts_gives_nothing_in_the_place_of_what_kms_does_not_take_it_says_why() {
        let now = Instant::now();
        let mut state = State { held: Some(held("OLD", now)), ..State::default() };
        let later = now + Duration::from_secs(60);
        assert!(state.distrusts("OLD", later));
        state.note(Err(error(ErrorKind::NoSession)), later);
        assert_eq!(turn(&state, later), ("use", false), "an STS that is away says nothing of them");
        state.note(Err(error(ErrorKind::RoleDenied)), later);
        assert_eq!(turn(&state, later), ("go away", false));
        assert!(state.distrusts("OLD", later), "still known as the session's");
    }

    #[test]
    fn what_is_said_of_a_role_names_it_and_shows_no_secret() {
        let session = session();
        for (kind, told) in [
            (ErrorKind::AccessDenied, ErrorKind::RoleDenied),
            (ErrorKind::Refused, ErrorKind::RoleDenied),
            (ErrorKind::Credentials, ErrorKind::Credentials),
            (ErrorKind::Throttled, ErrorKind::NoSession),
            (ErrorKind::Unanswered, ErrorKind::NoSession),
            (ErrorKind::ServerFault, ErrorKind::NoSession),
            (ErrorKind::NotSent, ErrorKind::NoSession),
        ] {
            let error = session.told(error(kind));
            assert_eq!(error.kind, told);
            assert!(!error.kind.may_have_taken_effect(), "nothing was sent to KMS");
            assert!(error.message.contains("arn:aws:iam::111122223333:role/keyferry"), "{error}");
        }
        assert!(!format!("{session:?}").contains("hush-hush"));
    }

    /// The bounds are far from what is measured, and from what they would be if everybody waited.
    #[tokio::test]
    async fn nobody_waits_long_for_an_sts_that_hangs_and_most_not_at_all() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let session = session_at(&endpoint, Duration::from_secs(120));
        let begun = Instant::now();
        for _ in 0..60 {
            assert_eq!(session.credentials().await.unwrap_err().kind, ErrorKind::NoSession);
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        // All that time one call was under way.
        assert!(session.state.borrow().is_asking);
        let mut calls = 0;
        while let Ok(accepted) = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await {
            // Whoever else comes by the port is none.
            let (connection, _) = accepted.unwrap();
            let mut begin = [0; 4];
            let readable = tokio::time::timeout(Duration::from_secs(1), connection.readable()).await;
            let read = readable.map_or(0, |_| connection.try_read(&mut begin).unwrap_or(0));
            calls += usize::from(&begin[..read] == b"POST");
        }
        assert_eq!(calls, 1, "one AssumeRole");
    }

    fn session() -> Arc<Session> {
        session_at("http://127.0.0.1:1", Duration::from_secs(5))
    }

    fn session_at(endpoint: &str, attempt_timeout: Duration) -> Arc<Session> {
        let role = Role {
            arn: "arn:aws:iam::111122223333:role/keyferry".into(),
            external_id: Some("hush-hush".into()),
            session_name: "keyferry".into(),
            session: LIFE,
        };
        let config = aws_sdk_sts::Config::builder()
            .behavior_version(aws_config::BehaviorVersion::v2026_01_12())
            .region(aws_sdk_sts::config::Region::new("eu-central-1"))
            .credentials_provider(Credentials::for_tests())
            .endpoint_url(endpoint);
        let sts = aws_sdk_sts::Client::from_conf(config.build());
        let calls = AwsCalls::of(&crate::telemetry::Metrics::new().unwrap());
        Session::new(role, "111122223333".into(), sts, attempt_timeout, calls)
    }
}
