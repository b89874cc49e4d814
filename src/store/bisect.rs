//! One bad row never takes its batch with it.

use super::StoreError;

/// Runs `verb` on the whole slice; when Postgres refuses a row, on its halves, down to the row at fault,
/// which gets the error. Costs about two transactions a halving, and only when a row is bad.
pub async fn bisect<T, R, F, Fut>(items: &[T], verb: F) -> Result<Vec<Result<R, StoreError>>, StoreError>
where
    F: Fn(std::ops::Range<usize>) -> Fut,
    Fut: Future<Output = Result<Vec<R>, StoreError>>,
{
    let mut outcomes = Vec::with_capacity(items.len());
    let whole = 0..items.len();
    let mut left = Vec::from([whole]);
    while let Some(range) = left.pop() {
        match verb(range.clone()).await {
            Ok(done) => outcomes.extend(done.into_iter().map(Ok)),
            Err(error @ StoreError::Data(_)) if range.len() == 1 => outcomes.push(Err(error)),
            Err(StoreError::Data(_)) => {
                let middle = range.start + range.len() / 2;
                // The left half is taken from the stack first: outcomes keep the order of the slice.
                left.push(middle..range.end);
                left.push(range.start..middle);
            }
            Err(other) => return Err(other),
        }
    }
    Ok(outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;

    proptest! {
        #[test]
        fn only_bad_rows_fail_and_order_is_kept(bad in proptest::collection::vec(any::<bool>(), 0..60)) {
            let calls = Cell::new(0);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let outcomes = runtime.block_on(bisect(&bad, |range| {
                calls.set(calls.get() + 1);
                let bad = &bad;
                async move {
                    if bad[range.clone()].iter().any(|bad| *bad) {
                        Err(StoreError::Data("bad".into()))
                    } else {
                        Ok(range.collect::<Vec<usize>>())
                    }
                }
            })).unwrap();
            prop_assert_eq!(outcomes.len(), bad.len());
            for (at, outcome) in outcomes.iter().enumerate() {
                match outcome {
                    Ok(index) => prop_assert!(!bad[at] && *index == at),
                    Err(_) => prop_assert!(bad[at]),
                }
            }
            if bad.iter().all(|bad| !bad) {
                prop_assert_eq!(calls.get(), 1);
            }
        }
    }
}
