//! Counters for people: what the processor did, by name.
//!
//! **In:** events that the engine's Rust code counts where they happen; translated code counts nothing. **Out:** a value a name
//! ([`CpuStats::each`]), so that whoever shows them needs no list of his own. Invariant: no counter has an influence on anything, and none is
//! part of a machine's state: they begin at 0 in every process.

/// Defines a set of counters: a structure of `u64` fields that can also be gone through by name.
#[macro_export]
macro_rules! counters {
    ($(#[$meta:meta])* pub struct $name:ident { $($(#[$doc:meta])* pub $field:ident,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct $name { $($(#[$doc])* pub $field: u64,)* }
        impl $name {
            /// Calls `f` with the name and the value of each.
            pub fn each(&self, f: &mut dyn FnMut(&'static str, u64)) {
                $(f(stringify!($field), self.$field);)*
            }
        }
    };
}

counters! {
    /// What the engine's loop and the helpers of translated code did.
    pub struct EngineStats {
        /// Times translated code was entered from the loop (once for every exit; a single instruction that runs alone is an entry, too).
        pub entries,
        /// Times the loop or a helper looked a block up, and translated it if there was none.
        pub lookups,
        /// Calls from translated code for a memory access that it could not make by itself.
        pub memory_calls,
        /// Calls from translated code for a system instruction.
        pub system_calls,
        /// Instructions that ran alone: faulting ones, accesses to devices and across pages, stores to watched pages, the last before a stop.
        pub alone,
        /// Stores that a helper did, most of them to page tables.
        pub helper_stores,
        /// Exceptions delivered to the guest, page faults among them.
        pub exceptions,
        /// Interrupts delivered to the guest.
        pub interrupts,
        /// Memory accesses of traces that went to so many pages in turn that they were translated anew without a site.
        pub sites_given_up,
    }
}

counters! {
    /// Times translated code was left for the engine's loop, by cause. Single instructions that ran alone are not among them.
    pub struct ExitStats {
        /// A jump whose target no jump cache knew.
        pub lookup,
        /// A direct jump that was not linked yet; it is from then on, if it can be.
        pub link,
        /// The position at which the run has to stop is too near for the whole block.
        pub budget,
        /// A memory access or a system instruction after which the loop has to look at everything afresh: an interrupt can be taken, a device wants
        /// attention, the mode changed.
        pub helper,
        /// The block's next instruction has to run alone.
        pub alone,
        /// The host's processor raised an exception in translated code (division by zero, SSE, alignment ...), which is the guest's.
        pub host_fault,
        /// As `alone`, after a helper tried in vain.
        pub bail,
        /// A block had run so often that it becomes a trace.
        pub hot,
    }
}

counters! {
    /// The soft TLB and what watches the guest's page tables.
    pub struct MmuStats {
        /// Accesses that neither translated code nor the first level could translate: Rust had to look.
        pub misses,
        /// Those of them that the second level, the current address space's, knew.
        pub second_hits,
        /// Walks of the guest's page tables, those that ended in a page fault among them.
        pub walks,
        /// Translations that a walk put into the second level.
        pub fills,
        /// Times every translation was forgotten.
        pub flushes,
        /// Times the translations of one page, or of one entry of a page table, were forgotten.
        pub page_flushes,
        /// Stores to pages that serve as page tables.
        pub table_stores,
        /// Stores that changed bytes of pages that hold translated code.
        pub code_stores,
    }
}

counters! {
    /// The code cache.
    pub struct CacheStats {
        /// Pieces of code translated: traces, blocks, single instructions.
        pub blocks,
        /// Guest instructions in them; the same one may be translated often.
        pub instructions,
        /// Traces among the pieces.
        pub traces,
        /// Pieces dropped one by one: overwritten, grown into a trace, or translated anew without sites.
        pub killed,
        /// Those of them whose bytes the guest, or a device, wrote to.
        pub overwritten,
        /// Traces among those dropped that get another chance with sites and groups.
        pub chances,
        /// Times the cache was full and everything was dropped.
        pub full_flushes,
    }
}

counters! {
    /// Cache groups: what is kept of each address space.
    pub struct GroupStats {
        /// Switches from one address space to another.
        pub switches,
        /// Switches to one that was kept.
        pub hits,
        /// Switches to one of which nothing was known.
        pub misses,
        /// Elements given to another address space.
        pub replaced,
        /// First-level entries that a switch cleared and their element kept.
        pub saved,
        /// Times the upper half had to be forgotten because a root had other entries there.
        pub unshared,
    }
}

counters! {
    /// System instructions, executed by Rust instead of the silicon, by kind. A REP instruction counts once for every step of at most 4096
    /// iterations.
    pub struct SystemStats {
        /// String instructions: MOVS, STOS, LODS, CMPS, SCAS, INS, OUTS, with or without REP.
        pub string,
        /// PUSHF, POPF, ENTER, XLAT.
        pub stack,
        /// Segment registers, descriptor tables, SWAPGS.
        pub segments,
        /// SYSCALL, SYSRET, INT, IRET, far jumps, calls and returns.
        pub transfer,
        /// CLI and STI.
        pub interrupt_flag,
        /// RDMSR and WRMSR; the local APIC's registers are among them in x2APIC mode.
        pub msr,
        /// CPUID.
        pub cpuid,
        /// RDTSC and RDTSCP.
        pub time_stamp,
        /// INVLPG and INVPCID.
        pub invalidate,
        /// HLT.
        pub halt,
        /// Control and debug registers, and what is left of their kind.
        pub control,
        /// Images of the x87 and SSE state, MXCSR.
        pub fpu,
        /// XSAVE and its relatives.
        pub xsave,
        /// Masked and gathering vector accesses.
        pub vector,
        /// IN and OUT.
        pub io,
        /// What else: near branches and stack instructions where segments have limits, decimal instructions, what the model lacks.
        pub other,
    }
}

counters! {
    /// How full the caches are now.
    pub struct CpuGauges {
        /// Bytes of translated code.
        pub code_bytes,
        /// Bytes there is room for.
        pub code_capacity,
        /// Address spaces that are kept.
        pub address_spaces,
    }
}

/// Everything that is counted of a processor.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct CpuStats {
    /// The loop and the helpers.
    pub engine: EngineStats,
    /// Why translated code was left.
    pub exits: ExitStats,
    /// The soft TLB.
    pub tlb: MmuStats,
    /// The code cache.
    pub code: CacheStats,
    /// Cache groups.
    pub groups: GroupStats,
    /// System instructions.
    pub system: SystemStats,
    /// What is no counter: how full things are.
    pub now: CpuGauges,
}

impl CpuStats {
    /// Calls `f` with every counter: its set, its name, its value. Not with [`CpuStats::now`], which can fall.
    pub fn each(&self, f: &mut dyn FnMut(&'static str, &'static str, u64)) {
        self.engine.each(&mut |name, value| f("engine", name, value));
        self.exits.each(&mut |name, value| f("exits", name, value));
        self.tlb.each(&mut |name, value| f("tlb", name, value));
        self.code.each(&mut |name, value| f("code", name, value));
        self.groups.each(&mut |name, value| f("groups", name, value));
        self.system.each(&mut |name, value| f("system", name, value));
    }
}

impl ExitStats {
    /// Counts one more ([`crate::frame::exit`]).
    #[inline]
    pub(crate) fn count(&mut self, reason: u64) {
        use crate::frame::exit;
        let counter = match reason {
            exit::LOOKUP => &mut self.lookup,
            exit::LINK => &mut self.link,
            exit::BUDGET => &mut self.budget,
            exit::HELPER => &mut self.helper,
            exit::ALONE => &mut self.alone,
            exit::HOST_FAULT => &mut self.host_fault,
            exit::BAIL => &mut self.bail,
            exit::HOT => &mut self.hot,
            _ => return,
        };
        *counter += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_a_name_of_its_own() {
        let stats = CpuStats {
            exits: ExitStats { hot: 3, ..ExitStats::default() },
            system: SystemStats { other: 5, ..SystemStats::default() },
            ..CpuStats::default()
        };
        let mut all = std::collections::BTreeMap::new();
        let mut calls = 0;
        stats.each(&mut |set, name, value| {
            calls += 1;
            all.insert((set, name), value);
        });
        assert_eq!(all.len(), calls);
        assert_eq!((all[&("exits", "hot")], all[&("system", "other")], all[&("engine", "entries")]), (3, 5, 0));
    }
}
