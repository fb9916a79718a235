// A bare kernel for the tests: begins in protected mode (multiboot or PVH), and goes through everything that 32-bit kernels do, telling it on
// the serial port. Ends by the debug-exit port. QEMU runs it with the same output.
.intel_syntax noprefix
.code32

.set MULTIBOOT, 0x1badb002
.set CODE, 0x08
.set DATA, 0x10
.set USER_CODE, 0x18
.set USER_DATA, 0x20
.set TSS, 0x28
.set SMALL, 0x30
.set CODE_64, 0x38
.set GATE, 0x40
.set DOWN, 0x48

.section .text.first, "ax"
.align 4
#ifndef PVH_ONLY
    .long MULTIBOOT, 3, -(MULTIBOOT + 3)
#endif

.section .note.pvh, "a", @note
    .long 4, 4, 18
    .asciz "Xen"
    .long pvh

.text
.macro say text
    call say_next
    .asciz "\text"
.endm

.global _start
_start:
    mov esp, offset stack_top
    cmp eax, 0x2badb002
    jne bad
    mov edi, ebx
    say "multiboot: "
    push [edi + 16]
    call print
    say "\nmodule: "
    mov eax, [edi + 24]
    push [eax]
    call print
    say "\nmemory: "
    mov eax, [edi + 4]
    call hex
    jmp common

pvh:
    mov esp, offset stack_top
    mov edi, ebx
    cmp dword ptr [edi], 0x336ec578
    jne bad
    say "pvh: "
    push [edi + 24]
    call print
    say "\nmodule: "
    mov eax, [edi + 16]
    push [eax]
    call print
    say "\nmap of "
    mov eax, [edi + 48]
    cmp eax, 3
    jb bad
    say "several ranges"
    jmp common

bad:
    say "not what was expected\n"
    mov eax, 1
    jmp exit

common:
    // Descriptor tables of our own; the TSS's address goes into its descriptor, handlers into the gates.
    mov eax, offset tss
    mov [gdt + TSS + 2], ax
    shr eax, 16
    mov [gdt + TSS + 4], al
    mov eax, offset through_gate
    mov [gdt + GATE], ax
    shr eax, 16
    mov [gdt + GATE + 6], ax
    xor ecx, ecx
1:  mov eax, ecx
    shl eax, 4
    add eax, offset stubs
    mov [idt + ecx * 8], ax
    mov word ptr [idt + ecx * 8 + 2], CODE
    mov word ptr [idt + ecx * 8 + 4], 0xee00
    shr eax, 16
    mov [idt + ecx * 8 + 6], ax
    inc ecx
    cmp ecx, 256
    jb 1b
    lgdt [gdtr]
    lidt [idtr]
    jmp CODE:2f
2:  mov eax, DATA
    mov ds, eax
    mov es, eax
    mov fs, eax
    mov gs, eax
    mov ss, eax
    mov eax, TSS
    ltr ax
    say "\nown tables\n"

    // A software interrupt, a breakpoint, an overflow, a bound, an undefined instruction, a division by zero.
    int 0x40
    int3
    mov al, 0x7f
    add al, 1
    into
    mov dword ptr [resume], offset 3f
    bound eax, [limits]
3:  mov dword ptr [resume], offset 3f
    ud2
3:  mov dword ptr [resume], offset 3f
    xor ecx, ecx
    div ecx

    // Segments: a limit, a null selector, an expand-down one, a selector beyond the table.
3:  mov eax, SMALL
    mov fs, eax
    mov eax, fs:[0xffc]
    mov dword ptr [resume], offset 3f
    mov eax, fs:[0xffd]
3:  xor eax, eax
    mov gs, eax
    mov dword ptr [resume], offset 3f
    mov eax, gs:[0]
3:  mov eax, DOWN
    mov gs, eax
    mov eax, gs:[0x1000]
    mov dword ptr [resume], offset 3f
    mov eax, gs:[0xfff]
3:  mov eax, 0x1230
    mov dword ptr [resume], offset 3f
    mov gs, eax
3:  mov eax, DATA
    mov fs, eax
    mov gs, eax
    say "segments\n"

    // 32-bit paging: the first 8 MiB by large pages, then a page table for 4 KiB pages at 8 MiB.
    mov dword ptr [directory], 0x83
    mov dword ptr [directory + 4], 0x400083
    mov eax, offset table
    or eax, 3
    mov [directory + 8], eax
    mov dword ptr [table], 0x200003
    mov eax, cr4
    or eax, 0x10
    mov cr4, eax
    mov eax, offset directory
    mov cr3, eax
    mov eax, cr0
    or eax, 0x80010000
    mov cr0, eax
    mov dword ptr [0x800004], 0x12345678
    mov eax, [0x200004]
    call hex
    say " through a page; entries "
    mov eax, [table]
    call hex
    mov eax, [directory + 4]
    call hex
    say "\n"
    mov dword ptr [resume], offset 3f
    mov eax, [0x801000]
3:  mov dword ptr [table], 0x200001
    invlpg [0x800000]
    mov dword ptr [resume], offset 3f
    mov [0x800000], eax
3:  mov dword ptr [table], 0x201003
    mov dword ptr [0x201004], 77
    invlpg [0x800000]
    mov eax, [0x800004]
    call hex
    say " through another\n"

    // PAE paging.
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov eax, offset directory_pae
    or eax, 1
    mov [pointers], eax
    mov dword ptr [pointers + 4], 0
    mov dword ptr [directory_pae], 0x83
    mov dword ptr [directory_pae + 8], 0x200083
    mov dword ptr [directory_pae + 16], 0x200083
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, offset pointers
    mov cr3, eax
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    mov eax, [0x400004]
    call hex
    say " through PAE\n"
    mov dword ptr [resume], offset 3f
    mov eax, [0x40000000]
3:
    // Long mode and back.
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov eax, offset level3
    or eax, 3
    mov [level4], eax
    mov eax, offset directory_pae
    or eax, 3
    mov [level3], eax
    mov eax, offset level4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    say "compatibility mode\n"
    jmp CODE_64:long
.code64
long:
    mov rax, 0x1122334455667788
    mov r15, rax
    shr rax, 32
    mov [rip + saved], eax
    push CODE
    lea rax, [rip + back]
    push rax
    retfq
.code32
back:
    mov eax, [saved]
    call hex
    say " from 64-bit code\n"
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080
    rdmsr
    and eax, 0xfffffeff
    wrmsr
    say "protected mode again\n"

    // User code at level 3 and back, by a call gate with two parameters, an interrupt, and SYSENTER.
    mov ecx, 0x174
    mov eax, CODE
    xor edx, edx
    wrmsr
    inc ecx
    mov eax, offset stack_top
    wrmsr
    inc ecx
    mov eax, offset entered
    wrmsr
    push USER_DATA | 3
    push offset user_stack_top
    push 0x2
    push USER_CODE | 3
    push offset user
    iretd

user:
    mov eax, USER_DATA | 3
    mov ds, eax
    mov es, eax
    push 0x111
    push 0x222
    call GATE:0
    // The gate has released the parameters.
    mov eax, esp
    sub eax, offset user_stack_top
    int 0x41
    mov dword ptr [resume], offset 3f
    hlt
3:  pushad
    popad
    pushf
    push 0
    popf
    popf
    mov ebp, esp
    enter 16, 3
    leave
    mov ecx, 3
    xor edx, edx
4:  add edx, ecx
    loop 4b
    mov eax, edx
    int 0x41
    mov ecx, esp
    mov edx, offset 5f
    sysenter
5:  say "back by SYSEXIT\n"
    int 0x42

through_gate:
    mov eax, [esp + 8]
    shl eax, 12
    or eax, [esp + 12]
    call hex
    say " through a call gate\n"
    retf 8

entered:
    push edx
    push ecx
    say "by SYSENTER\n"
    pop ecx
    pop edx
    sysexit

finish:
    mov eax, DATA
    mov ds, eax
    mov es, eax
    say "done\n"
    mov eax, 16
exit:
    mov dx, 0xf4
    out dx, eax
    hlt
    jmp exit

// Every vector's stub: pushes its number (and a zero in place of an error code).
.align 16
stubs:
.set vector, 0
.rept 256
    .align 16
    .if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17
    .else
        push 0
    .endif
    push offset vector
    .byte 0xe9
    .long trap - . - 4
    .set vector, vector + 1
.endr

.align 8
trap:
    pushad
    mov ax, ds
    push eax
    mov eax, DATA
    mov ds, eax
    mov es, eax
    mov ebx, [esp + 36]
    cmp ebx, 0x42
    je finish
    say "["
    mov eax, ebx
    call hex
    cmp ebx, 0x20
    jae 1f
    say "error "
    mov eax, [esp + 40]
    call hex
1:  cmp ebx, 14
    jne 1f
    say "at "
    mov eax, cr2
    call hex
1:  cmp ebx, 0x41
    jne 1f
    mov eax, [esp + 32]
    call hex
1:  say "level "
    mov eax, [esp + 48]
    and eax, 3
    call hex
    say "]\n"
    // Faults go on where they were told to, traps behind themselves.
    cmp ebx, 3
    je 1f
    cmp ebx, 4
    je 1f
    cmp ebx, 0x20
    jae 1f
    mov eax, [resume]
    mov [esp + 44], eax
1:  pop eax
    mov ds, eax
    mov es, eax
    popad
    add esp, 8
    iretd

// Prints what follows the call, to its NUL, and returns behind it. Keeps all registers.
say_next:
    xchg esi, [esp]
    pushf
    push eax
    cld
1:  lodsb
    test al, al
    jz 2f
    call put
    jmp 1b
2:  pop eax
    popf
    xchg esi, [esp]
    ret

// Prints the text at the address on the stack, which it releases.
print:
    push esi
    mov esi, [esp + 8]
1:  lodsb
    test al, al
    jz 2f
    call put
    jmp 1b
2:  pop esi
    ret 4

// Prints EAX.
hex:
    push ecx
    push eax
    mov ecx, 8
1:  rol eax, 4
    push eax
    and al, 15
    add al, 0x90
    daa
    adc al, 0x40
    daa
    call put
    pop eax
    loop 1b
    mov al, ' '
    call put
    pop eax
    pop ecx
    ret

// Prints AL. At any level: user code may use the ports (the TSS has a map).
put:
    push edx
    mov dx, 0x3f8
    out dx, al
    pop edx
    ret

.data
.align 16
gdt:
    .quad 0
    .quad 0x00cf9a000000ffff
    .quad 0x00cf92000000ffff
    .quad 0x00cffa000000ffff
    .quad 0x00cff2000000ffff
    .long tss_end - tss - 1, 0x00008900
    .quad 0x0040920000000fff
    .quad 0x00af9a000000ffff
    .long CODE << 16, 0x0000ec02
    .quad 0x0040960000000fff
gdt_end:
gdtr:
    .word gdt_end - gdt - 1
    .long gdt
idtr:
    .word 256 * 8 - 1
    .long idt
limits:
    .long 0, 5
resume:
    .long 0
saved:
    .long 0
.align 16
tss:
    .long 0, trap_stack_top, DATA
    .fill 22, 4, 0
    .word 0, 104
    // All ports.
    .fill 8192, 1, 0
    .byte 0xff
tss_end:

.bss
.align 4096
directory: .skip 4096
table: .skip 4096
directory_pae: .skip 4096
level3: .skip 4096
level4: .skip 4096
pointers: .skip 32
idt: .skip 256 * 8
.align 16
    .skip 4096
stack_top:
    .skip 4096
trap_stack_top:
    .skip 4096
user_stack_top:
