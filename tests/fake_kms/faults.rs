//! Faults on order: which calls go wrong, and how.

use serde::{Deserialize, Serialize};

use crate::journal::names;
use crate::kinds::Operation;
use crate::refusal::Refusal;

/// How a call goes wrong.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// An error answer. With `after_effect` the call has done its work all the same.
    Error {
        /// Exception.
        code: String,
        /// HTTP status; 500 for KMS's two internal faults, else 400, unless given.
        #[serde(default)]
        status: Option<u16>,
        /// Text.
        #[serde(default)]
        message: String,
        /// Whether the work is done before the error is answered.
        #[serde(default)]
        after_effect: bool,
    },
    /// KMS's throttling answer.
    Throttle,
    /// No effect and no answer: the connection is closed after `ms`, or stays open for a day.
    Hang {
        /// When to close.
        #[serde(default)]
        ms: Option<u64>,
    },
    /// The effect happens, but the connection is closed without an answer: at once, or after `ms`.
    LoseAnswer {
        /// When to close.
        #[serde(default)]
        ms: Option<u64>,
    },
    /// No answer; the call takes effect `ms` later, or when released, against the state of that time.
    Late {
        /// When to take effect; only when released if absent.
        #[serde(default)]
        ms: Option<u64>,
        /// How long the connection stays open; closed at once if absent.
        #[serde(default)]
        hang_ms: Option<u64>,
    },
    /// `DescribeKey` answers with the state before the last change.
    StaleDescribe,
    /// The call stops before its effect until released.
    Hold,
}

impl Fault {
    /// Its name, as in the control interface.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Error { after_effect: false, .. } => "error",
            Self::Error { after_effect: true, .. } => "error_after_effect",
            Self::Throttle => "throttle",
            Self::Hang { .. } => "hang",
            Self::LoseAnswer { .. } => "lose_answer",
            Self::Late { .. } => "late",
            Self::StaleDescribe => "stale_describe",
            Self::Hold => "hold",
        }
    }
}

/// The answer that an `error` fault stands for.
pub fn error_answer(code: &str, status: Option<u16>, message: &str) -> Refusal {
    let internal = matches!(code, "KMSInternalException" | "DependencyTimeoutException");
    Refusal {
        status: status.unwrap_or(if internal { 500 } else { 400 }),
        code: code.to_owned().into(),
        message: message.to_owned(),
    }
}

/// A fault together with the calls it is for.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Which operation; any if absent.
    #[serde(default)]
    pub operation: Option<String>,
    /// Which key, by ARN or id; any if absent.
    #[serde(default)]
    pub key: Option<String>,
    /// For how many calls; until cleared if absent.
    #[serde(default)]
    pub times: Option<u64>,
    /// How many matching calls pass unharmed first.
    #[serde(default)]
    pub skip: u64,
    /// What goes wrong.
    pub fault: Fault,
}

/// All orders in force, oldest first.
#[derive(Debug, Default)]
pub struct Faults {
    orders: Vec<(u64, Order)>,
    last_id: u64,
}

impl Faults {
    /// Adds an order and gives its id.
    pub fn add(&mut self, order: Order) -> u64 {
        self.last_id += 1;
        self.orders.push((self.last_id, order));
        self.last_id
    }

    /// Withdraws one order, or all of them.
    pub fn clear(&mut self, id: Option<u64>) {
        self.orders.retain(|(own, _)| id.is_some_and(|id| id != *own));
    }

    /// The orders in force.
    pub fn orders(&self) -> &[(u64, Order)] {
        &self.orders
    }

    /// The fault for this call, if any: that of the oldest matching order whose `skip` is used up.
    pub fn take(&mut self, operation: Operation, key_arn: Option<&str>) -> Option<Fault> {
        let at = self.orders.iter_mut().position(|(_, order)| {
            let matches = order.operation.as_deref().is_none_or(|name| name == operation.name())
                && order.key.as_deref().is_none_or(|key| key_arn.is_some_and(|arn| names(key, arn)))
                && order.times != Some(0);
            let skipped = matches && order.skip > 0;
            if skipped {
                order.skip -= 1;
            }
            matches && !skipped
        })?;
        let (_, order) = self.orders.get_mut(at)?;
        let fault = order.fault.clone();
        if let Some(times) = &mut order.times {
            *times -= 1;
            if *times == 0 {
                self.orders.remove(at);
            }
        }
        Some(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMPORT: Operation = Operation::ImportKeyMaterial;

    fn order(fault: Fault, times: Option<u64>, skip: u64) -> Order {
        Order { operation: Some(IMPORT.name().to_owned()), key: None, times, skip, fault }
    }

    #[test]
    fn an_order_skips_strikes_and_ends() {
        let mut faults = Faults::default();
        faults.add(order(Fault::Throttle, Some(2), 1));
        assert_eq!(faults.take(Operation::ListKeys, None), None);
        let struck: Vec<_> = (0..4).map(|_| faults.take(IMPORT, None).is_some()).collect();
        assert_eq!(struck, [false, true, true, false]);
        assert!(faults.orders().is_empty());
    }

    #[test]
    fn the_oldest_order_comes_first_and_one_alone_is_cleared() {
        let mut faults = Faults::default();
        let first = faults.add(Order { key: Some("k1".to_owned()), ..order(Fault::Hold, None, 0) });
        faults.add(order(Fault::Throttle, None, 0));
        assert_eq!(faults.take(IMPORT, Some("arn:aws:kms:r:1:key/k1")), Some(Fault::Hold));
        assert_eq!(faults.take(IMPORT, Some("arn:aws:kms:r:1:key/k2")), Some(Fault::Throttle));
        faults.clear(Some(first));
        assert_eq!(faults.take(IMPORT, Some("arn:aws:kms:r:1:key/k1")), Some(Fault::Throttle));
        faults.clear(None);
        assert_eq!(faults.take(IMPORT, None), None);
    }

    #[test]
    fn internal_faults_are_500() {
        assert_eq!(error_answer("KMSInternalException", None, "").status, 500);
        assert_eq!(error_answer("AccessDeniedException", None, "").status, 400);
        assert_eq!(error_answer("AccessDeniedException", Some(403), "").status, 403);
    }
}
