//! Lines are given back when attempts end: on to the next head, or to wait in a lane.

use super::StoreError;
use super::claim::millis;
use super::lock::Held;
use super::settle::{Settlement, SettlementKind};
use deadpool_postgres::Transaction;
use std::time::Duration;
use time::OffsetDateTime;

/// Gives lines back: on to the next head, or later to the same job.
///
/// `$10`: how many places the head goes on at most. Where all of these ended out of turn, the line is due and its next
/// claim goes on from there. `$11`: the Region of the lane that a line goes into. `$12`: whether it goes before the others
/// there.
pub const RELEASE: &str = "
    with released as materialized (
        select asked.*, before.urgent_seq is null as was_head,
               coalesce(next.seq, least(before.tail_seq + 1, ahead.first + $10)) as next_seq,
               coalesce(next.lane_id, before.lane_id) as next_lane_id
        from unnest($1::bigint[], $2::boolean[], $3::boolean[], $4::timestamptz[], $5::timestamptz[], $6::text[], $7::text[],
                    $11::text[], $12::boolean[])
             as asked(id, ended, counted, due_at, deadline, operation, late_effect, region, goes_first)
        join line as before on before.id = asked.id
        -- From the head on, or from behind it if its job is the one that ends.
        cross join lateral (
            select before.head_seq + (coalesce(before.urgent_seq, before.head_seq) = before.head_seq)::int as first
        ) as ahead
        left join lateral (
            -- Jobs that ended out of turn, being urgent or cancelled, are passed over.
            select job.seq, job.lane_id from (
                select seq, lane_id, state from job
                where line_id = before.id and seq >= ahead.first order by seq limit $10
            ) as job
            where job.state = 'waiting' order by job.seq limit 1
        ) as next on asked.ended
    )
    update line set
        token = null,
        urgent_seq = null,
        head_seq = case when released.ended then released.next_seq else line.head_seq end,
        attempt = case
            when released.ended then case when released.next_seq = line.head_seq then line.attempt else 0 end
            when released.was_head then line.attempt - (not released.counted)::int
            else line.attempt end,
        due_at = case
            when released.ended and released.next_seq > line.tail_seq then null
            -- The head was overtaken: it goes on waiting as it was to.
            when released.ended and released.next_seq = line.head_seq then greatest($8, line.head_due_at)
            when released.ended then $8::timestamptz
            -- Whatever waits for its import has waited for its parameters before: the oldest goes first.
            when released.goes_first and released.operation = 'ImportKeyMaterial' then coalesce((
                select greatest(waiting.scan_from, least($8, job.accepted_at)) from lane as now
                join lane as waiting on waiting.account = now.account and waiting.region = released.region
                                    and waiting.operation = released.operation
                join job on job.line_id = released.id and job.seq = coalesce(line.urgent_seq, line.head_seq)
                where now.id = line.lane_id), $8)
            when released.goes_first then least($8, (
                -- Not below the bound, where claims seldom look.
                select greatest(waiting.scan_from, first.due_at - interval '1 us') from lane as now
                join lane as waiting on waiting.account = now.account and waiting.region = released.region
                                    and waiting.operation = released.operation
                cross join lateral (select line.due_at from line
                                    where line.lane_id = waiting.id and line.due_at >= waiting.scan_from
                                    order by line.due_at limit 1) as first
                where now.id = line.lane_id))
            when $8 < released.deadline then greatest($8, least(released.due_at, released.deadline))
            else greatest($8, released.due_at) end,
        lane_id = coalesce(
            case when released.ended and released.next_seq = line.head_seq then line.head_lane_id end,
            case when released.ended then released.next_lane_id
                 else (select waiting.id from lane as now
                       join lane as waiting on waiting.account = now.account
                                           and waiting.region = coalesce(released.region, now.region)
                       where now.id = line.lane_id and waiting.operation = released.operation) end,
            line.lane_id),
        head_due_at = case when not released.ended and not released.was_head then line.head_due_at end,
        head_lane_id = case when not released.ended and not released.was_head then line.head_lane_id end,
        late_effect = coalesce(released.late_effect, line.late_effect),
        late_until = case when released.late_effect is null then line.late_until
                          else greatest(line.late_until, $8 + $9 * interval '1 ms') end
    from released
    where line.id = released.id";

/// How many jobs that ended out of turn are passed over at once.
pub(super) const SKIP: i64 = 1_000;

/// Gives back the lines of attempts that end.
pub(super) async fn release(
    transaction: &Transaction<'_>,
    ends: &[(&Settlement, &Held)],
    now: OffsetDateTime,
    signature_life: Duration,
) -> Result<(), StoreError> {
    let count = ends.len();
    let (mut lines, mut ended, mut counted) =
        (Vec::with_capacity(count), Vec::with_capacity(count), Vec::with_capacity(count));
    let (mut due, mut deadlines) = (Vec::with_capacity(count), Vec::with_capacity(count));
    let (mut operations, mut late) = (Vec::with_capacity(count), Vec::with_capacity(count));
    let (mut regions, mut first) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for (end, _) in ends {
        let own_region = end.job.key.region();
        let (is_end, counts, at, deadline, lane) = match &end.kind {
            SettlementKind::Ended { .. } => (true, true, now, now, None),
            SettlementKind::Retry { delay, deadline, next, .. } => {
                (false, true, now + *delay, *deadline, Some((next.as_str(), own_region)))
            }
            SettlementKind::AwaitSlot { deadline, lane, throttled, .. } => {
                (false, throttled.is_some(), now, *deadline, Some((lane.operation.as_str(), lane.region.as_str())))
            }
            SettlementKind::PutBack { until, deadline } => (false, false, *until, *deadline, None),
        };
        lines.push(end.lease.line_id);
        ended.push(is_end);
        counted.push(counts);
        due.push(at);
        deadlines.push(deadline);
        operations.push(lane.map(|(operation, _)| operation));
        regions.push(lane.map(|(_, region)| region));
        first.push(matches!(end.kind, SettlementKind::AwaitSlot { .. }));
        late.push(end.late_effect.as_deref());
    }
    let release = transaction.prepare_cached(RELEASE).await?;
    transaction
        .execute(
            &release,
            &[
                &lines,
                &ended,
                &counted,
                &due,
                &deadlines,
                &operations,
                &late,
                &now,
                &millis(signature_life),
                &SKIP,
                &regions,
                &first,
            ],
        )
        .await?;
    Ok(())
}
