//! The policy in force: one for the whole process, replaced as a whole.

use super::Policy;
use std::sync::Arc;
use tokio::sync::watch;

/// Gives the policy in force, without waiting.
#[derive(Clone, Debug)]
pub struct Current(watch::Receiver<Arc<Policy>>);

/// Replaces it.
#[derive(Debug)]
pub struct Keeper(watch::Sender<Arc<Policy>>);

/// Puts a policy in force.
pub fn current(policy: Policy) -> (Keeper, Current) {
    let (sender, receiver) = watch::channel(Arc::new(policy));
    (Keeper(sender), Current(receiver))
}

impl Current {
    /// The policy that is in force now. Whoever judges several things by one policy keeps it that long.
    pub fn get(&self) -> Arc<Policy> {
        Arc::clone(&self.0.borrow())
    }
}

impl Keeper {
    /// The policy in force.
    pub fn get(&self) -> Arc<Policy> {
        Arc::clone(&self.0.borrow())
    }

    /// Puts another in force, and returns the one before.
    pub fn replace(&self, policy: Policy) -> Arc<Policy> {
        self.0.send_replace(Arc::new(policy))
    }
}
