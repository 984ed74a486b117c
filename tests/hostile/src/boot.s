# From the PVH entry (32-bit, no paging) to 64-bit code with the first 4 GiB mapped to themselves, and the exceptions' stubs.

.section .note.Xen, "a"
	.long 4, 8, 18                  # XEN_ELFNOTE_PHYS32_ENTRY
	.asciz "Xen"
	.quad pvh_start

.section .text.boot, "ax"
.code32
.global pvh_start
pvh_start:
	cli
	mov esp, offset stack_top
	# Four tables of 2 MiB pages map 0..4 GiB; a fifth maps 32..33 GiB, where nothing is, to 512 GiB.
	mov edi, offset page_directories
	mov eax, 0x83                   # present, writable, large
	mov ecx, 2048
1:	mov dword ptr [edi], eax
	mov dword ptr [edi + 4], 0
	add eax, 0x200000
	add edi, 8
	loop 1b
	mov eax, 0x83
	mov ecx, 512
2:	mov dword ptr [edi], eax
	mov dword ptr [edi + 4], 8
	add eax, 0x200000
	add edi, 8
	loop 2b
	mov edi, offset page_directory_pointers
	mov eax, offset page_directories + 3
	mov ecx, 4
3:	mov dword ptr [edi], eax
	add eax, 0x1000
	add edi, 8
	loop 3b
	mov dword ptr [page_directory_pointers + 0x1000], eax
	mov dword ptr [page_map], offset page_directory_pointers + 3
	mov dword ptr [page_map + 8], offset page_directory_pointers + 0x1003
	mov eax, cr4
	or eax, 0x620                   # PAE, OSFXSR, OSXMMEXCPT
	mov cr4, eax
	mov eax, offset page_map
	mov cr3, eax
	mov ecx, 0xc0000080             # EFER
	rdmsr
	or eax, 0x100                   # LME
	wrmsr
	mov eax, cr0
	and eax, 0xfffffffb             # no EM
	or eax, 0x80000003              # PG, MP, PE
	mov cr0, eax
	lgdt [gdt_pointer]
	push 8
	mov eax, offset long_mode
	push eax
	retf

.code64
long_mode:
	mov ax, 16
	mov ds, ax
	mov es, ax
	mov ss, ax
	mov rsp, offset stack_top
	call start
	hlt

# Each stub leaves an error code and its number on the stack.
.macro stub number, has_code
.balign 16
	.if \has_code == 0
	push 0
	.endif
	push \number
	jmp exception
.endm

.balign 16
.global exception_stubs
exception_stubs:
.irp number, 0,1,2,3,4,5,6,7
	stub \number, 0
.endr
	stub 8, 1
	stub 9, 0
.irp number, 10,11,12,13,14
	stub \number, 1
.endr
	stub 15, 0
	stub 16, 0
	stub 17, 1
.irp number, 18,19,20
	stub \number, 0
.endr
	stub 21, 1
.irp number, 22,23,24,25,26,27,28
	stub \number, 0
.endr
	stub 29, 1
	stub 30, 1
	stub 31, 0

# An instruction that may fault has left the address behind it in RESUME_AT: go on there and say that it did.
exception:
	cmp qword ptr [RESUME_AT], 0
	je 1f
	push rax
	mov rax, [RESUME_AT]
	mov [rsp + 24], rax
	mov qword ptr [RESUME_AT], 0
	mov byte ptr [FAULTED], 1
	pop rax
	add rsp, 16
	iretq
1:	mov rdi, [rsp]
	mov rsi, [rsp + 16]
	and rsp, -16
	call unexpected_exception
	hlt

.section .data
.balign 8
gdt:
	.quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
	.word 23
	.quad gdt

.section .bss
.balign 4096
page_map: .skip 0x1000
page_directory_pointers: .skip 0x2000
page_directories: .skip 0x5000
.skip 0x10000
stack_top:
