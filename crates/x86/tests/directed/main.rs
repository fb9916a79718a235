//! The rules that random instructions seldom meet: code that changes itself, page tables that change, exact stops, shadows, steps of
//! string instructions. Each runs with blocks of one, few and many instructions, warm and cold.
#[path = "../silicon/bus.rs"]
mod bus;
mod code;
mod groups;
#[path = "../silicon/memory.rs"]
mod memory;
mod narrow;
mod paging;
mod privileged;
mod stops;
mod strings;
#[allow(dead_code, reason = "the LDT is the silicon test's")]
#[path = "../silicon/system.rs"]
mod system;
mod vectors;
mod world;
