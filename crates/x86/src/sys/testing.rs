//! A small world for unit tests: RAM, page tables, a bus that remembers.
