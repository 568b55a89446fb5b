# Writes kernel_sources.cpp: the text of every kernel header, as the extension carries it.
# cmake -DFOLDER=csrc/kernels -DOUTPUT=kernel_sources.cpp -P embed.cmake
file(GLOB headers "${FOLDER}/*.cuh")
list(SORT headers)
set(text "#include \"kernel_sources.h\"\n\nnamespace fp8gemm {\n\nstatic const KernelSource kAll[] = {\n")
foreach(header ${headers})
  get_filename_component(name "${header}" NAME)
  file(READ "${header}" content)
  string(APPEND text "{\"${name}\", R\"__source__(${content})__source__\"},\n")
endforeach()
string(APPEND text "};\n\nstd::span<const KernelSource> kernel_sources() { return kAll; }\n\n}  // namespace fp8gemm\n")
file(WRITE "${OUTPUT}" "${text}")
