-- Turns of those who write refusals. Rows of a table, because only whoever may write it can lock them: an advisory lock can be
-- taken, and kept, by everybody who may connect.

create table refusal_turn (turn integer primary key);
-- As many as refuse.rs counts. Two kins that share one by chance only wait for each other.
insert into refusal_turn select generate_series(0, 1023);
grant select, update on refusal_turn to keyferry_worker;
