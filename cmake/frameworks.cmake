# Libraries through which other frameworks call the ops; each is one small file over the C ABI.
# onnxruntime: built always, its C interface is a table of functions that csrc/bindings/onnxruntime declares itself.
if(FASTEE_PYTHON AND EXISTS "${PROJECT_SOURCE_DIR}/csrc/bindings/onnxruntime/ort_ops.cc")
  add_library(fastee_ort MODULE csrc/bindings/onnxruntime/ort_ops.cc)
  list(APPEND FASTEE_FRAMEWORKS fastee_ort)
endif()
# jax: where the Python that is built for has jaxlib, whose wheel brings XLA's FFI headers.
if(FASTEE_PYTHON)
  execute_process(COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; s = u.find_spec('jaxlib'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE FASTEE_JAXLIB OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(FASTEE_JAXLIB AND EXISTS "${FASTEE_JAXLIB}/include/xla/ffi/api/ffi.h")
    add_library(fastee_jax MODULE csrc/bindings/jax/jax_ffi.cc)
    target_include_directories(fastee_jax SYSTEM PRIVATE "${FASTEE_JAXLIB}/include")
    list(APPEND FASTEE_FRAMEWORKS fastee_jax)
  endif()
endif()
foreach(library IN LISTS FASTEE_FRAMEWORKS)
  target_link_libraries(${library} PRIVATE fastee fastee_flags)
  set_target_properties(${library} PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${PROJECT_SOURCE_DIR}/fastee" BUILD_RPATH "$ORIGIN" INSTALL_RPATH "$ORIGIN" BUILD_WITH_INSTALL_RPATH ON)
  install(TARGETS ${library} LIBRARY DESTINATION fastee)
endforeach()
