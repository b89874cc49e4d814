//! The statement that takes lines with work, and slots for their next scarce calls.

use crate::store::lanes::other_lanes;

/// Takes up to `$1` due lines: first those whose lease ran out, then of lanes that have any, the longest unserved first, an
/// equal share each.
///
/// `$2` lease in milliseconds. `$3` whether to look below the lanes' `scan_from`. `$4`: slots are given out when they are no
/// further away. Of a governed lane no more lines are taken than it has slots, by the arithmetic of [`crate::quota`]; who
/// gives them out has its row, and others pass it over meanwhile. Where nothing is found the one row says when the first
/// closed lane opens.
/// A lane that was served lately may have left many dead entries in the index of due lines: it is looked at above its
/// `scan_from` only, and the search for other lanes with work, which skips from one to the next in the index, goes
/// round it. So neither dead entries nor idle lanes cost anything.
pub const CLAIM: &str = concat!(
    "
    with recursive clock as materialized (select keyferry_now() as now),
    known as materialized (
        select id, case when $3::boolean then '-infinity' else scan_from end as scan_from
        from lane where served_at > (select now from clock) - interval '1 day' order by id
    ),
",
    other_lanes!(),
    "
    busy(lane_id) as (
        select id from known
        where exists (select from line where line.lane_id = known.id
                      and line.due_at >= known.scan_from and line.due_at <= (select now from clock))
        union all
        -- A lane whose lines are all parked, or wait, takes no share from the others.
        select lane_id from other where lane_id is not null
        and exists (select from line where line.lane_id = other.lane_id and line.due_at <= (select now from clock))
    ),
    open_lane as materialized (
        select lane.id, lane.served_at, lane.interval_ms is not null as is_governed,
               case when $3::boolean then '-infinity' else lane.scan_from end as scan_from
        from busy join lane on lane.id = busy.lane_id
        where lane.open_at <= (select now from clock)
    ),
    governed as materialized (
        select lane.id, lane.account, lane.region, lane.operation, lane.tolerance_ms, greatest(lane.tat, clock.now) as base,
               lane.interval_ms / lane_factor(lane.factor, lane.interval_ms, lane.eased_at, clock.now) as pace_ms
        from lane, clock
        where lane.id in (select id from open_lane where is_governed) and lane.open_at <= clock.now
          and lane.interval_ms is not null
        order by lane.id for no key update of lane skip locked
    ),
    served_lane as materialized (
        select open_lane.id, open_lane.scan_from, open_lane.served_at, count(*) over () as lanes,
               case when open_lane.is_governed then greatest(0, 1 + floor(
                   (extract(epoch from clock.now - base)::float8 * 1000 + $4 + tolerance_ms) / pace_ms)) end as slots
        from open_lane cross join clock left join governed on governed.id = open_lane.id
        where not open_lane.is_governed or governed.id is not null
        order by open_lane.served_at, open_lane.id
    ),
    lost as materialized (
        -- What was left behind may be in doubt. The bound keeps the look away from dead entries.
        select line.id, line.lane_id from line
        where line.token is not null and line.due_at <= (select now from clock)
          and line.due_at >= case when $3::boolean then '-infinity' else (select now from clock) - interval '10 s' end
        order by line.due_at limit $1
        for no key update skip locked
    ),
    found as materialized (
        select due.id, due.lane_id, due.due_at from served_lane cross join lateral (
            select line.id, line.lane_id, line.due_at from line
            where line.lane_id = served_lane.id and line.token is null
              and line.due_at >= served_lane.scan_from and line.due_at <= (select now from clock)
            order by line.due_at
            limit least(greatest(1, $1::bigint / served_lane.lanes), served_lane.slots::bigint)
            for no key update skip locked
        ) as due
        limit greatest(0, $1 - (select count(*) from lost))
    ),
    picked as materialized (
        select id, lane_id, true as taken_over, null::bigint as nth from lost
        union all
        select id, lane_id, false, row_number() over (partition by lane_id order by due_at) from found
    ),
    reserved as (
        update lane set served_at = (select now from clock),
                        tat = base + taken.slots * pace_ms * interval '1 ms',
                        open_at = base + (taken.slots * pace_ms - governed.tolerance_ms
                                          - case when pace_ms > $4 then $4 else $4 / 2 end) * interval '1 ms'
        from governed join (select lane_id, max(nth) as slots from picked group by lane_id) as taken
             on taken.lane_id = governed.id and taken.slots > 0
        where lane.id = governed.id
    ),
    served as (
        update lane set served_at = (select now from clock)
        where id in (
            select lane.id from lane
            where lane.id in (select lane_id from picked where nth is not null) and lane.interval_ms is null
              and lane.served_at < (select now from clock) - interval '100 ms'
            for no key update skip locked)
    ),
    claimed as (
        update line
        set token = gen_random_uuid(),
            due_at = clock.now + $2 * interval '1 ms',
            attempt = line.attempt + 1,
            urgent_seq = null
        from picked left join governed on governed.id = picked.lane_id and picked.nth is not null, clock
        where line.id = picked.id
        returning line.id, line.token, picked.taken_over, clock.now,
                  case when line.late_until > clock.now then line.late_effect end, line.late_until,
                  governed.account, governed.region, governed.operation,
                  case when governed.id is not null
                       then greatest(clock.now, base + ((nth - 1) * pace_ms - tolerance_ms) * interval '1 ms') end,
                  base + (nth - 1) * pace_ms * interval '1 ms', base + nth * pace_ms * interval '1 ms', pace_ms, tolerance_ms
    )
    select * from claimed
    union all
    select null, null, null, (select now from clock), null, null, null, null, null, least(
        (select min(lane.open_at) from busy join lane on lane.id = busy.lane_id where lane.open_at > (select now from clock)),
        -- Somebody else is just giving out the slots of these.
        (select now from clock) + case when exists (
            select from open_lane where is_governed and id not in (select id from governed)) then interval '10 ms' end
    ), null, null, null, null
    where not exists (select from picked)"
);
