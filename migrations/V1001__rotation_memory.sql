-- What a rotate remembers beyond its choice.

-- An older binary would leave `is_tied` behind when the material is brought again, so that its source key could be deleted.
update schema_tolerance set oldest_binary = 1001;

-- The material that was in force when a rotate first committed itself to bring another. What is in force still was not
-- brought by it.
alter table progress add column rotated_from text;
alter table failed_choice add column rotated_from text;
grant select (rotated_from) on progress to keyferry_reader;
grant select (rotated_from) on failed_choice to keyferry_reader;

-- The Region whose key the kept import parameters are of; null: the job's own. A rotate works in one Region at a time.
alter table progress add column parameters_region text;
grant select (parameters_region) on progress to keyferry_reader;

-- False: the material was taken away again while it waited for its rotation. AWS ties a key only to what was in force.
alter table kms_material add column is_tied boolean not null default true;
grant select (is_tied) on kms_material to keyferry_reader;
