//! Heads that stand at jobs which have ended go on.

use super::StoreError;
use super::settle::SKIP;
use deadpool_postgres::Transaction;

/// Moves the heads of locked lines to the next jobs that wait, and gives up whatever lease was just taken of them.
///
/// Not all the way at once where very many have ended out of turn: then the line is due, and its next claim goes on.
pub(super) async fn go_on(transaction: &Transaction<'_>, lines: &[i64]) -> Result<(), StoreError> {
    const GO_ON: &str = "
        with ahead as materialized (
            select before.id, coalesce(next.seq, least(before.tail_seq + 1, before.head_seq + $2)) as next_seq,
                   coalesce(next.lane_id, before.lane_id) as next_lane_id
            from unnest($1::bigint[]) as asked(id)
            join line as before on before.id = asked.id
            left join lateral (
                select job.seq, job.lane_id from (
                    select seq, lane_id, state from job
                    where line_id = before.id and seq >= before.head_seq order by seq limit $2
                ) as job
                where job.state = 'waiting' order by job.seq limit 1
            ) as next on true
        )
        update line set token = null, urgent_seq = null, head_seq = ahead.next_seq, attempt = 0,
                        due_at = case when ahead.next_seq <= line.tail_seq then keyferry_now() end,
                        lane_id = ahead.next_lane_id, head_due_at = null, head_lane_id = null
        from ahead where line.id = ahead.id";
    let go_on = transaction.prepare_cached(GO_ON).await?;
    transaction.execute(&go_on, &[&lines, &SKIP]).await?;
    Ok(())
}
