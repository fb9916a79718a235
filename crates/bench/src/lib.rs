//! Side-by-side measurements against the peers, printed as ratios.
//!
//! *In*: Debian packages, this workspace's `twinstep`, and QEMU where it is installed. *Out*: a table of medians and ratios, a chart, and every single
//! figure as JSON. *Invariant*: everybody runs the very same programs on the very same inputs with the very same script, and prints the same results, or
//! it is an error; times are taken on the host between lines on the console, so no guest's clock can flatter anyone.
//!
//! One boot runs the whole plan of workloads; engines take turns within a repetition, so that a host that is slower for a while is slower
//! for all. Nothing here is a test: a figure that got worse is for people to see, not for CI to fail.
//!
//! | module | what |
//! | --- | --- |
//! | [`workload`] | what is run: names and sizes; the programs lie in `src/guest` |
//! | [`guest`] | the root folder and the initramfs, from packages |
//! | [`engine`] | who runs it: natively, Twinstep in its modes and variants, QEMU |
//! | [`marks`] | lines on the console |
//! | [`boot`] | one run of one engine, watched |
//! | [`pair`] | the table of a protected pair: `bench --pair` |
//! | [`host`] | what `/proc` says: CPU time, memory, the machine |
//! | [`stats`], [`summary`], [`table`], [`chart`], [`report`] | figures to people |

pub mod boot;
pub mod chart;
pub mod engine;
pub mod guest;
pub mod host;
pub mod marks;
pub mod pair;
pub mod report;
pub mod stats;
pub mod summary;
pub mod table;
pub mod workload;
