-- Dead letters: a message is matched to its refusals by what it says, whoever sent it.

create index refusal_letter on refusal (id_hash, digest);
