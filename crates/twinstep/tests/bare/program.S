// A 32-bit Linux program for the tests: system calls by INT 80h and through the vDSO (SYSCALL on AMD's processors), thread-local storage by a
// segment of its own, a segment with a limit in the LDT, string and decimal instructions, SSE; faults and signals.
.intel_syntax noprefix
.code32

.macro say text
    call say_next
    .asciz "\text"
.endm

.text
.global _start
_start:
    say "32-bit program\n"
    // The auxiliary vector lies behind the arguments and the environment.
    mov esi, esp
1:  lodsd
    test eax, eax
    jnz 1b
1:  lodsd
    test eax, eax
    jnz 1b
1:  lodsd
    test eax, eax
    jnz 1f
    // Arguments end with a zero as well: two lists, then the vector.
    lodsd
1:  cmp eax, 32
    je 2f
    lodsd
    lodsd
    test eax, eax
    jnz 1b
    say "no vDSO\n"
    jmp 3f
2:  lodsd
    mov [vsyscall], eax
    mov eax, 20
    int 0x80
    mov edi, eax
    mov eax, 20
    call [vsyscall]
    cmp eax, edi
    jne bad
    // A hundred thousand of them.
    mov edi, 100000
1:  mov eax, 20
    call [vsyscall]
    dec edi
    jnz 1b
    mov eax, 4
    mov ebx, 1
    mov ecx, offset by_vsyscall
    mov edx, offset by_vsyscall_end - by_vsyscall
    call [vsyscall]

3:  // A segment of 4 GiB that begins at `local`: set_thread_area.
    mov eax, 243
    mov ebx, offset area
    int 0x80
    test eax, eax
    jnz bad
    mov eax, [area]
    lea eax, [eax * 8 + 3]
    mov gs, eax
    mov eax, gs:[0]
    cmp eax, 0x51ab
    jne bad
    mov eax, gs:[-4]
    cmp eax, 0x7e57
    jne bad
    mov ecx, 10000
1:  add gs:[4], ecx
    loop 1b
    mov eax, gs:[4]
    cmp eax, 50005000
    jne bad
    say "thread-local storage\n"

    // A segment of 16 bytes: modify_ldt.
    mov eax, 123
    mov ebx, 1
    mov ecx, offset small
    mov edx, 16
    int 0x80
    test eax, eax
    jnz bad
    mov eax, 7
    mov fs, eax
    mov eax, fs:[12]
    cmp eax, 4
    jne bad
    // rt_sigaction(SIGSEGV): beyond the limit.
    mov eax, 174
    mov ebx, 11
    mov ecx, offset action
    xor edx, edx
    mov esi, 8
    int 0x80
    mov eax, fs:[13]
beyond:
    cmp dword ptr [caught], 1
    jne bad
    say "a limit\n"

    // Strings, decimal, SSE and x87.
    cld
    mov edi, offset buffer
    mov ecx, 5000
    mov al, 3
    rep stosb
    mov esi, offset buffer
    xor edx, edx
    mov ecx, 5000
1:  lodsb
    movzx eax, al
    add edx, eax
    loop 1b
    cmp edx, 15000
    jne bad
    mov al, 0x79
    add al, 0x35
    daa
    jnc bad
    cmp al, 0x14
    jne bad
    movups xmm0, [buffer]
    paddd xmm0, xmm0
    movd eax, xmm0
    cmp eax, 0x06060606
    jne bad
    fild dword ptr [three]
    fsqrt
    fmul st, st
    fistp dword ptr [buffer]
    cmp dword ptr [buffer], 3
    jne bad
    say "instructions\n"

    // fork, and wait for the child's status.
    mov eax, 2
    int 0x80
    test eax, eax
    jnz 1f
    mov ebx, 7
    mov eax, 1
    int 0x80
1:  mov eax, 7
    mov ebx, -1
    mov ecx, offset status
    xor edx, edx
    int 0x80
    cmp dword ptr [status], 0x700
    jne bad
    say "a child\n"
    mov ebx, 42
    jmp exit
bad:
    say "WRONG\n"
    mov ebx, 1
exit:
    mov eax, 1
    int 0x80

handler:
    // The frame: return address, signal, siginfo, context.
    inc dword ptr [caught]
    mov eax, [esp + 12]
    mov dword ptr [eax + 20 + 14 * 4], offset beyond
    ret

restorer:
    mov eax, 173
    int 0x80

// Prints what follows the call, to its NUL, and returns behind it. Keeps all registers.
say_next:
    pushad
    mov ecx, [esp + 32]
    mov edx, -1
1:  inc edx
    cmp byte ptr [ecx + edx], 0
    jne 1b
    lea eax, [ecx + edx + 1]
    mov [esp + 32], eax
    mov eax, 4
    mov ebx, 1
    int 0x80
    popad
    ret

.data
vsyscall:
    .long 0
area:
    // Entry (any), base, limit in pages; 32-bit, limit in pages, useable.
    .long -1, local, 0xfffff, 0x51
small:
    .long 0, numbers, 15, 0x41
action:
    // Handler, flags (SA_SIGINFO, SA_RESTORER), restorer, mask.
    .long handler, 0x04000004, restorer, 0, 0
    .long 0x7e57
local:
    .long 0x51ab, 0
numbers:
    .long 1, 2, 3, 4
caught:
    .long 0
status:
    .long 0
three:
    .long 3
by_vsyscall:
    .ascii "by the vDSO\n"
by_vsyscall_end:
.bss
buffer:
    .skip 5008
