//! How statements find the lanes that have work.

/// Two tables behind `known(id)`, the lanes that were served lately: `gap`, the ids between those, and `other(lane_id)`,
/// the other lanes that have lines with work, or null. It skips from one to the next in the index of due lines, so that
/// neither the dead entries of the known lanes nor lanes without work cost anything.
macro_rules! other_lanes {
    () => {
        "
    gap(low, high) as (
        select coalesce(lag(id) over (order by id), 0), id from known
        union all
        select coalesce(max(id), 0), 9223372036854775807 from known
    ),
    other(lane_id, high) as (
        select (select line.lane_id from line
                where due_at is not null and line.lane_id > gap.low and line.lane_id < gap.high
                order by line.lane_id limit 1), high
        from gap
        union all
        select (select line.lane_id from line
                where due_at is not null and line.lane_id > other.lane_id and line.lane_id < other.high
                order by line.lane_id limit 1), high
        from other where other.lane_id is not null
    ),"
    };
}
pub(super) use other_lanes;
