//! Heads that stand at jobs which have ended go on.

use super::StoreError;
use super::release::SKIP;
use deadpool_postgres::Transaction;

/// What becomes of a line's lease when its head goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Leases {
    /// It is another's, for an urgent job.
    Stay,
    /// It was taken just now, for the job that has ended.
    GiveUp,
}

/// Moves the heads of locked lines to the next jobs that wait; what waits next of the line is due. Where an urgent job
/// is next and stays so, as the flags say, it keeps its own time.
///
/// Not all the way at once where very many have ended out of turn: then the line is due, and its next claim goes on.
pub(super) async fn advance(
    transaction: &Transaction<'_>,
    lines: &[(i64, bool)],
    leases: Leases,
) -> Result<(), StoreError> {
    const ADVANCE: &str = "
        with ahead as materialized (
            select before.id,
                   coalesce(next.seq, least(before.tail_seq + 1, before.head_seq + $3)) as next_seq,
                   coalesce(next.lane_id, before.lane_id) as next_lane_id,
                   next.seq is distinct from before.head_seq as moves,
                   asked.urgent_stays or (before.token is not null and not $4) as keeps
            from unnest($1::bigint[], $2::boolean[]) as asked(id, urgent_stays)
            join line as before on before.id = asked.id
            left join lateral (
                select job.seq, job.lane_id from (
                    select seq, lane_id, state from job
                    where line_id = before.id and seq >= before.head_seq order by seq limit $3
                ) as job
                where job.state = 'waiting' order by job.seq limit 1
            ) as next on true
        )
        update line set
            token = case when not $4 then token end,
            urgent_seq = case when not $4 then urgent_seq end,
            head_seq = next_seq,
            attempt = case when moves then 0 else attempt end,
            due_at = case when next_seq > tail_seq then null
                          when keeps then due_at
                          when moves then keyferry_now()
                          when parked_by is not null then coalesce(head_due_at, keyferry_now())
                          else coalesce(head_due_at, due_at) end,
            parked_by = case when keeps and next_seq <= tail_seq then parked_by end,
            lane_id = case when keeps then lane_id
                           when moves then next_lane_id
                           else coalesce(head_lane_id, lane_id) end,
            head_due_at = case when keeps and head_due_at is not null
                               then case when moves then keyferry_now() else head_due_at end end,
            head_lane_id = case when keeps and head_due_at is not null
                                then case when moves then next_lane_id else head_lane_id end end
        from ahead where line.id = ahead.id";
    if !lines.is_empty() {
        let (ids, stays): (Vec<i64>, Vec<bool>) = lines.iter().copied().unzip();
        let advance = transaction.prepare_cached(ADVANCE).await?;
        transaction.execute(&advance, &[&ids, &stays, &SKIP, &(leases == Leases::GiveUp)]).await?;
    }
    Ok(())
}
