-- The quota governor: one schedule of calls for each lane and all workers (generic cell rate algorithm).
--
-- An older binary makes its calls without slots: AWS throttles it as before, and nothing else comes of it.

-- The theoretical arrival time of the next call, by the one clock.
alter table lane add column tat timestamptz not null default '-infinity';
-- How far apart the calls are to be at full rate, and by how much one may come before its theoretical time: what may be
-- made at once after a pause. Null: the lane is not governed. The worker that started last has written both.
alter table lane add column interval_ms double precision check (interval_ms > 0);
alter table lane add column tolerance_ms double precision not null default 0 check (tolerance_ms >= 0);
-- AWS throttled all the same: the part of the rate that was left, and since when it grows again.
alter table lane add column factor double precision not null default 1 check (factor > 0 and factor <= 1);
alter table lane add column eased_at timestamptz not null default '-infinity';
-- Which line was throttled last, and when. One key that is throttled again and again is a hot key, and no sign of a quota.
alter table lane add column throttled_line bigint;
alter table lane add column throttled_at timestamptz not null default '-infinity';

-- The part of the rate that a lane has at a time: it grows by a twentieth in the time of a hundred calls.
create function lane_factor(factor double precision, interval_ms double precision, eased_at timestamptz, at timestamptz)
    returns double precision
    language sql immutable parallel safe
    as $$ select case when factor >= 1 then 1 else least(1, factor
        + 0.0005 * greatest(0, extract(epoch from at - eased_at)::double precision) * 1000 / interval_ms) end $$;

-- Leases by their end: what a worker left behind goes before what waits in lanes, and needs none of their slots.
create index line_leased on line (due_at) where token is not null;
