from neighborlm.common.one_name import refuse_bare_name

refuse_bare_name(__name__)
