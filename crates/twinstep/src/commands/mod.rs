//! One module a command.
pub mod arbiter;
pub mod channel;
pub mod debug;
pub mod demo;
pub mod doctor;
pub mod events;
pub mod failover;
pub mod pki;
pub mod replay;
pub mod run;
pub mod standby;
pub mod stat;
pub mod status;
pub mod switch;
pub mod top;
pub mod vote;
