-- Refusals' events are told again like those of jobs: what they say is kept beside the reason.

-- As the request says, and with the trace in which it came.
alter table refusal add column operation text;
alter table refusal add column key text;
alter table refusal add column traceparent text;
-- False in rows from before, and in those of older binaries: what their events said is not all here.
alter table refusal add column is_whole boolean not null default false;
