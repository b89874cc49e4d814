//! Urgent jobs: deletes that overtake their line.
//!
//! An urgent job has its place at the end of the line like any other, and a row in `urgent` beside it. A claim runs the
//! lowest of these before the job at the head. Only a head whose job may have changed AWS, or has, is not overtaken:
//! that is settled first. Meanwhile the line remembers when and in which lane its head is to run.
//!
//! One that is found held is parked by itself: it keeps its place in the line, and others go on before it.

use super::StoreError;
use deadpool_postgres::Transaction;
use time::OffsetDateTime;
use uuid::Uuid;

/// `next(line_id, seq)`: of the lines `$1` those whose urgent job is next.
macro_rules! next {
    () => {
        "first as materialized (
            select distinct on (urgent.line_id) urgent.line_id, urgent.seq, urgent.parked_by is not null as is_parked
            from urgent
            join line on line.id = urgent.line_id
            join job on job.line_id = urgent.line_id and job.seq = urgent.seq
            left join progress on progress.job_id = job.id
            -- One look where there is none, not one for each line.
            where (select exists (select from urgent)) and urgent.line_id = any($1)
              -- At the head it is next, held or not.
              and (urgent.parked_by is null or urgent.seq = line.head_seq)
            -- What one may have done is settled before another runs that was parked meanwhile.
            order by urgent.line_id,
                     coalesce(progress.in_doubt or progress.imported or progress.key_material_id is not null or progress.deleted_ids <> '{}', false) desc,
                     urgent.parked_by is not null, urgent.seq
        ),
        next as materialized (
            select first.line_id, first.seq, first.is_parked from first join line on line.id = first.line_id
            where not exists (
                select from job join progress on progress.job_id = job.id
                where job.line_id = line.id and job.seq = line.head_seq and job.seq <> first.seq
                  and (progress.in_doubt or progress.imported or progress.key_material_id is not null or progress.deleted_ids <> '{}'))
        )"
    };
}

/// Puts urgent jobs before the heads of lines that were just claimed. Where there is none it costs a look into an
/// empty index.
pub const OVERTAKE: &str = concat!(
    "with ",
    next!(),
    ",
    counted as (
        update urgent set attempt = attempt + 1 from next where urgent.line_id = next.line_id and urgent.seq = next.seq
    )
    -- The claim has counted for the head.
    update line set urgent_seq = next.seq, attempt = line.attempt - 1 from next where line.id = next.line_id"
);

/// Lines that no lease holds are due at once for their urgent job, in its lane, unless a late effect still closes them.
const HURRY: &str = concat!(
    "with ",
    next!(),
    "
    update line set due_at = greatest($2::timestamptz, line.late_until), lane_id = job.lane_id,
                    -- A head that was parked is looked at again when it is next.
                    head_due_at = coalesce(line.head_due_at, case when line.parked_by is null then line.due_at else $2 end),
                    parked_by = null,
                    head_lane_id = coalesce(line.head_lane_id, line.lane_id)
    from next join job on job.line_id = next.line_id and job.seq = next.seq
    where line.id = next.line_id and line.token is null and not next.is_parked"
);

/// Jobs that have just taken these places of their lines overtake them.
pub(super) async fn join(
    transaction: &Transaction<'_>,
    places: &[(i64, i64)],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const INSERT: &str = "
        insert into urgent (line_id, seq)
        select * from unnest($1::bigint[], $2::bigint[]) as new(line_id, seq) order by line_id, seq";
    // Where another comes first its own delay stands.
    const FIRST: &str = "
        select line_id from urgent where line_id = any($1) and parked_by is null group by line_id having min(seq) = any($2)";
    if places.is_empty() {
        return Ok(());
    }
    let (lines, seqs): (Vec<i64>, Vec<i64>) = places.iter().copied().unzip();
    let insert = transaction.prepare_cached(INSERT).await?;
    transaction.execute(&insert, &[&lines, &seqs]).await?;
    let first = transaction.prepare_cached(FIRST).await?;
    let lines: Vec<i64> = transaction.query(&first, &[&lines, &seqs]).await?.iter().map(|row| row.get(0)).collect();
    hurry(transaction, &lines, now).await
}

/// The lines' urgent jobs, if there are any, run as soon as they can. The lines are locked.
pub(super) async fn hurry(transaction: &Transaction<'_>, lines: &[i64], now: OffsetDateTime) -> Result<(), StoreError> {
    if !lines.is_empty() {
        let hurry = transaction.prepare_cached(HURRY).await?;
        transaction.execute(&hurry, &[&lines, &now]).await?;
    }
    Ok(())
}

/// The jobs at these places have ended.
pub(super) async fn end(transaction: &Transaction<'_>, places: &[(i64, i64)]) -> Result<(), StoreError> {
    const DELETE: &str = "
        delete from urgent using unnest($1::bigint[], $2::bigint[]) as ended(line_id, seq)
        where urgent.line_id = ended.line_id and urgent.seq = ended.seq";
    change(transaction, DELETE, places).await
}

/// The jobs at these places are held, the third of each says by what. Lines whose head is another go on with it, or with
/// an urgent job that is not held; the lines are parked, and no lease holds them.
pub(super) async fn step_aside(
    transaction: &Transaction<'_>,
    held: &[(i64, i64, Uuid)],
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    const PARK: &str = "
        update urgent set parked_by = held.hold from unnest($1::bigint[], $2::bigint[], $3::uuid[]) as held(line_id, seq, hold)
        where urgent.line_id = held.line_id and urgent.seq = held.seq";
    const GO_ON: &str = "
        update line set due_at = greatest($3::timestamptz, head_due_at), lane_id = coalesce(head_lane_id, lane_id),
                        parked_by = null, head_due_at = null, head_lane_id = null
        from unnest($1::bigint[], $2::bigint[]) as held(line_id, seq)
        where line.id = held.line_id and line.head_seq <> held.seq";
    if held.is_empty() {
        return Ok(());
    }
    let lines: Vec<i64> = held.iter().map(|(line, ..)| *line).collect();
    let seqs: Vec<i64> = held.iter().map(|(_, seq, _)| *seq).collect();
    let holds: Vec<Uuid> = held.iter().map(|(.., hold)| *hold).collect();
    transaction.execute(PARK, &[&lines, &seqs, &holds]).await?;
    transaction.execute(GO_ON, &[&lines, &seqs, &now]).await?;
    hurry(transaction, &lines, now).await
}

/// Wakes a page of urgent jobs that these released holds have parked; says how many.
pub(super) async fn wake(transaction: &Transaction<'_>, released: &[Uuid], most: i64) -> Result<u64, StoreError> {
    const LOCK: &str = "
        select id, keyferry_now() from line where id in (
            select line_id from urgent where parked_by = any($1) order by parked_by, line_id limit $2)
        order by id for no key update skip locked";
    const WAKE: &str = "update urgent set parked_by = null where line_id = any($1) and parked_by = any($2)";
    let lock = transaction.prepare_cached(LOCK).await?;
    let rows = transaction.query(&lock, &[&released, &most]).await?;
    let Some(now) = rows.first().map(|row| row.get(1)) else { return Ok(0) };
    let lines: Vec<i64> = rows.iter().map(|row| row.get(0)).collect();
    let woken = transaction.execute(WAKE, &[&lines, &released]).await?;
    hurry(transaction, &lines, now).await?;
    Ok(woken)
}

/// The claims of the jobs at these places were no attempts.
pub(super) async fn uncount(transaction: &Transaction<'_>, places: &[(i64, i64)]) -> Result<(), StoreError> {
    const UNCOUNT: &str = "
        update urgent set attempt = attempt - 1 from unnest($1::bigint[], $2::bigint[]) as back(line_id, seq)
        where urgent.line_id = back.line_id and urgent.seq = back.seq";
    change(transaction, UNCOUNT, places).await
}

async fn change(transaction: &Transaction<'_>, statement: &str, places: &[(i64, i64)]) -> Result<(), StoreError> {
    if !places.is_empty() {
        let (lines, seqs): (Vec<i64>, Vec<i64>) = places.iter().copied().unzip();
        let statement = transaction.prepare_cached(statement).await?;
        transaction.execute(&statement, &[&lines, &seqs]).await?;
    }
    Ok(())
}
