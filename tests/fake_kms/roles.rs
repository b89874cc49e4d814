//! Roles that can be assumed, and the sessions that came of it.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};

use crate::crypto::{Unopened, random};
use crate::kinds::Millis;
use crate::refusal::{self, Refusal};
use crate::world::Principal;

/// A role, as far as it decides who may assume it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Role {
    /// Its ARN, which names its account.
    pub arn: String,
    /// The account whose credentials its trust policy lets in.
    pub trusts: String,
    /// The external id that its trust policy asks for.
    #[serde(default)]
    pub external_id: Option<String>,
    /// AWS's `MaxSessionDuration`.
    #[serde(default = "default_max_session")]
    pub max_session_seconds: i64,
}

/// Credentials that somebody has for a time.
#[derive(Clone, Debug)]
pub struct Session {
    /// The secret access key.
    pub secret: String,
    /// What has to come with every call.
    pub token: String,
    /// Who signs with it.
    pub principal: Principal,
    /// When they end, by the double's own clock.
    pub ends_at: Millis,
}

/// What is asked of `AssumeRole`.
pub struct Wanted<'a> {
    /// The role's ARN.
    pub role: &'a str,
    /// What the session is called.
    pub name: &'a str,
    /// The caller's external id.
    pub external_id: Option<&'a str>,
    /// For how long.
    pub seconds: i64,
}

/// All roles, and all sessions ever given out, by access key.
#[derive(Debug, Default)]
pub struct Roles {
    roles: HashMap<String, Role>,
    sessions: HashMap<String, Session>,
}

impl Roles {
    /// Adds a role, or changes it.
    pub fn set(&mut self, role: Role) {
        self.roles.insert(role.arn.clone(), role);
    }

    /// Takes a role away. Its sessions live on, as in AWS.
    pub fn remove(&mut self, arn: &str) -> bool {
        self.roles.remove(arn).is_some()
    }

    /// All roles.
    pub fn list(&self) -> Vec<&Role> {
        let mut roles: Vec<_> = self.roles.values().collect();
        roles.sort_unstable_by(|one, other| one.arn.cmp(&other.arn));
        roles
    }

    /// The session with an access key.
    pub fn session(&self, access_key: &str) -> Option<&Session> {
        self.sessions.get(access_key)
    }

    /// All sessions by their access keys, so that tests can look where they show.
    pub fn sessions(&self) -> impl Iterator<Item = (&String, &Session)> {
        self.sessions.iter()
    }

    /// Gives out a session and its access key.
    pub fn assume(
        &mut self,
        caller: &Principal,
        wanted: &Wanted<'_>,
        now: Millis,
    ) -> Result<(String, &Session), Refusal> {
        let role = self.roles.get(wanted.role);
        // AWS tells a role that does not exist from one that does not let in by nothing.
        let role = role
            .filter(|role| *caller.account == *role.trusts)
            .filter(|role| role.external_id.is_none() || role.external_id.as_deref() == wanted.external_id);
        let role = role.ok_or_else(|| denied(caller, wanted.role))?;
        if wanted.seconds > role.max_session_seconds {
            return Err(refusal::validation(
                "The requested DurationSeconds exceeds the MaxSessionDuration set for this role.",
            ));
        }
        let mut parts = role.arn.split(':');
        let (partition, account) = (parts.nth(1).unwrap_or_default(), parts.nth(2).unwrap_or_default());
        let name = role.arn.rsplit('/').next().unwrap_or_default();
        let internal = |Unopened| crate::operations::internal("no random bytes");
        let (id, secret) = (random::<8>().map_err(internal)?, random::<30>().map_err(internal)?);
        let token = random::<192>().map_err(internal)?;
        let access_key = format!("ASIA{}", hex::encode_upper(id));
        let session = Session {
            secret: BASE64.encode(secret),
            token: BASE64.encode(token),
            principal: Principal {
                access_key: Arc::clone(&caller.access_key),
                account: account.into(),
                session: Some(format!("arn:{partition}:sts::{account}:assumed-role/{name}/{}", wanted.name).into()),
            },
            ends_at: now.saturating_add(wanted.seconds.saturating_mul(1_000)),
        };
        let session = self.sessions.entry(access_key.clone()).insert_entry(session).into_mut();
        Ok((access_key, session))
    }
}

/// The text is AWS's.
fn denied(caller: &Principal, role: &str) -> Refusal {
    let message = format!("User: {} is not authorized to perform: sts:AssumeRole on resource: {role}", caller.arn());
    Refusal { status: 403, code: "AccessDenied".into(), message }
}

fn default_max_session() -> i64 {
    3_600
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const ROLE: &str = "arn:aws:iam::444455556666:role/teams/keyferry";

    fn roles() -> Roles {
        let mut roles = Roles::default();
        let external_id = Some("prod-42".to_owned());
        roles.set(Role { arn: ROLE.into(), trusts: "111122223333".into(), external_id, max_session_seconds: 3_600 });
        roles
    }

    fn caller(account: &str) -> Principal {
        Principal { access_key: "AKIA1".into(), account: account.into(), session: None }
    }

    #[test]
    fn who_is_trusted_gets_a_session_of_the_roles_account() {
        let mut roles = roles();
        let wanted = Wanted { role: ROLE, name: "me", external_id: Some("prod-42"), seconds: 900 };
        let (key, session) = roles.assume(&caller("111122223333"), &wanted, 5_000).unwrap();
        assert_eq!(session.principal.arn(), "arn:aws:sts::444455556666:assumed-role/keyferry/me");
        assert_eq!((&*session.principal.account, session.ends_at), ("444455556666", 905_000));
        assert_eq!(&*session.principal.access_key, "AKIA1");
        assert!(roles.session(&key).is_some());
    }

    #[test]
    fn who_is_not_trusted_or_asks_for_too_much_is_refused() {
        let mut roles = roles();
        let wanted = || Wanted { role: ROLE, name: "me", external_id: Some("prod-42"), seconds: 900 };
        let mut code = |account: &str, wanted: Wanted<'_>| {
            roles.assume(&caller(account), &wanted, 0).map(|_| ()).unwrap_err().code.into_owned()
        };
        assert_eq!(code("111122223334", wanted()), "AccessDenied");
        assert_eq!(code("111122223333", Wanted { external_id: None, ..wanted() }), "AccessDenied");
        assert_eq!(code("111122223333", Wanted { external_id: Some("other"), ..wanted() }), "AccessDenied");
        assert_eq!(code("111122223333", Wanted { role: "arn:aws:iam::1:role/x", ..wanted() }), "AccessDenied");
        assert_eq!(code("111122223333", Wanted { seconds: 3_601, ..wanted() }), "ValidationException");
    }
}
