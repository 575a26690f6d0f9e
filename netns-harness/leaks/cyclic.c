/* Debug symbols that lead nowhere: functions whose origins are themselves and each other. */
__attribute__((noinline, used)) int read_to_end(int connection)
{
	return connection + 1;
}
__asm__(
	".section .debug_abbrev,\"\",@progbits\n"
	/* 1: DW_TAG_compile_unit with children: DW_AT_low_pc, DW_AT_high_pc */
	".byte 1, 0x11, 1, 0x11, 1, 0x12, 7, 0, 0\n"
	/* 2: DW_TAG_subprogram with children: DW_AT_abstract_origin, DW_AT_low_pc, DW_AT_high_pc */
	".byte 2, 0x2e, 1, 0x31, 0x13, 0x11, 1, 0x12, 7, 0, 0\n"
	/* 3: DW_TAG_inlined_subroutine with children: the same */
	".byte 3, 0x1d, 1, 0x31, 0x13, 0x11, 1, 0x12, 7, 0, 0\n"
	/* 4: DW_TAG_subprogram: DW_AT_specification */
	".byte 4, 0x2e, 0, 0x47, 0x13, 0, 0\n"
	".byte 0\n"
	".section .debug_info,\"\",@progbits\n"
	"unit: .long end - version\n"
	"version: .short 4\n .long 0\n .byte 8\n"
	".byte 1\n .quad read_to_end\n .quad 64\n"
	"itself: .byte 2\n .long itself - unit\n .quad read_to_end\n .quad 64\n"
	"inlined: .byte 3\n .long other - unit\n .quad read_to_end\n .quad 64\n"
	"deeper: .byte 3\n .long inlined - unit\n .quad read_to_end\n .quad 64\n"
	".byte 0, 0, 0\n"
	"one: .byte 4\n .long other - unit\n"
	"other: .byte 4\n .long one - unit\n"
	".byte 0\n"
	"end:\n"
	".text\n");
