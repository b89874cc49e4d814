//! A KMIP server's answer, as a session takes it from the wire and a connection reads it, as every kind of key.

#![no_main]

use keyferry_fuzz::source::dsm::mutations::oracle::check;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    check(data);
});
